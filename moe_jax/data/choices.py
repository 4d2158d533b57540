"""One entry of a literal table by its name, or an error that proposes the nearest one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

from moe_jax.errors import ConfigError

T = TypeVar("T")


def choose(field: str, name: str, table: Mapping[str, T], shown: str | None = None) -> T:
  """`table[name]`; `shown` is the value the user wrote where `name` is only a part of it.

  Raises:
    ConfigError: there is no such entry.
  """
  if name in table:
    return table[name]
  near = difflib.get_close_matches(name, table, n=1)
  hint = f"did you mean {near[0]!r}? " if near else ""
  raise ConfigError(field, name if shown is None else shown, f"{hint}there are {', '.join(sorted(table))}")
