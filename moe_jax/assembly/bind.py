"""Binds options of a config to the function that the config names."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from moe_jax.errors import ConfigError, choose
from moe_jax.options import Config, arguments


def bind(
  table: Mapping[str, Callable], options: Mapping[str, Any] | Config, field: str
) -> functools.partial:
  """Returns the function of `table` that `options` names, with its options bound.

  Args:
    table: Functions by name. The keyword-only arguments of each are its options.
    options: {"name": name, name: {option: value}, ...}. The options of other names are checked, but
      not used.
    field: The dotted key of `options`, for messages.

  Raises:
    ConfigError: If there is no name, if a name or an option is unknown (the message proposes the
      nearest one), or if an option has the wrong type or is out of bounds.
  """
  if "name" not in options:
    raise ConfigError(f"{field}.name", None, f"is missing; known: {', '.join(table)}")
  choose(f"{field}.name", options["name"], table)
  check_options(table, options, field)
  return functools.partial(table[options["name"]], **dict(options.get(options["name"], {})))


def check_options(
  table: Mapping[str, Callable], options: Mapping[str, Any] | Config, field: str
) -> None:
  """Raises ConfigError, as `bind` does, for wrong options of any function of `table`."""
  for name in options:
    if name != "name":
      choose(field, name, table)
      _check_function(table[name], options[name], f"{field}.{name}")


def _check_function(function: Callable, options: Config, field: str) -> None:
  """Raises ConfigError unless `options` maps options of this function to allowed values."""
  keys = arguments(function)
  if not isinstance(options, (Mapping, ConfigDict, FrozenConfigDict)):
    raise ConfigError(
      field,
      options,
      f"holds the options of {field.rpartition('.')[2]} and is no value itself; to use "
      f"it, set {field.rpartition('.')[0]}.name",
    )
  for name, value in options.items():
    if name not in keys:
      near = difflib.get_close_matches(name, keys, n=1)
      hint = f"did you mean {near[0]!r}? " if near else ""
      raise ConfigError(
        f"{field}.{name}",
        value,
        hint + (f"the options are {', '.join(keys)}" if keys else "there are no options here"),
      )
    keys[name].check(f"{field}.{name}", value)
