"""Splits a command line into the flags of a command and everything else."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence

from moe_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Flag:
  """A flag of a command, `--name=value`.

  Attributes:
    name: The name without dashes.
    bare: The value that the flag has where no "=" follows it. None means that the value is then the
      next argument.
  """

  name: str
  bare: str | None = None


def take_flags(
  argv: Sequence[str], known: Sequence[Flag], config: bool = True, passes: bool = False
) -> tuple[dict[str, str], list[str]]:
  """Returns the values of a command's flags by name, and all other arguments in their order.

  Args:
    argv: The arguments, without the program.
    known: The flags of the command.
    config: Whether flags of a config (`--config=FILE`, `--config.KEY=VALUE`, `--router=...`) are
      other arguments.
    passes: Whether every flag that is not known is an other argument.

  Raises:
    ConfigError: There is no such flag; the nearest one is proposed.
  """
  by_name: Mapping[str, Flag] = {flag.name: flag for flag in known}
  values, rest, i = {}, [], 0
  while i < len(argv):
    name, equals, value = argv[i].partition("=")
    bare = name.lstrip("-")
    if not name.startswith("-"):
      rest.append(argv[i])
    elif bare in by_name:
      flag = by_name[bare]
      if not equals:
        if flag.bare is None:
          i += 1
          value = argv[i] if i < len(argv) else ""
        else:
          value = flag.bare
      values[bare] = value
    elif passes or (config and _is_of_config(bare)):
      rest.append(argv[i])
    else:
      raise _unknown(argv[i], bare, by_name, config)
    i += 1
  return values, rest


def _is_of_config(name: str) -> bool:
  """Returns whether `commands.parse` reads the flag of this name."""
  return name == "router" or name.removeprefix("no").startswith("config")


def _unknown(arg: str, bare: str, known: Mapping[str, Flag], config: bool) -> ConfigError:
  """Returns the mistake of a flag that there is not."""
  names = [*(["config", "router"] if config else []), *known]
  near = difflib.get_close_matches(bare, names, 1)
  hint = f"did you mean --{near[0]}? " if near else ""
  of_config = ["--config", "--config.KEY", "--router"] if config else []
  listed = ", ".join([*of_config, *(f"--{name}" for name in known), "--debug"])
  return ConfigError("flag", arg, f"{hint}the flags are {listed}")


def positional(rest: Sequence[str], names: Sequence[str]) -> list[str]:
  """Returns the arguments that are no flags, one for each name.

  Raises:
    ConfigError: There are more or fewer of them.
  """
  if len(rest) < len(names):
    missing = names[len(rest)]
    raise ConfigError(missing, None, f"is missing; the arguments are {' '.join(names)}")
  if len(rest) > len(names):
    remedy = f"the arguments are {' '.join(names)}" if names else "there are only flags"
    raise ConfigError("argument", rest[len(names)], f"is one too many; {remedy}")
  return list(rest)


def switch(name: str, value: str | None) -> bool:
  """Returns whether a flag that is on or off is on; None means that it is not given.

  Raises:
    ConfigError: The value is neither of true, false and nothing.
  """
  states = {None: False, "": True, "true": True, "True": True, "false": False, "False": False}
  if value not in states:
    raise ConfigError(name, value, f"must be --{name} alone, --{name}=true or --{name}=false")
  return states[value]


def number(name: str, value: str) -> float:
  """Returns the value of a flag that is a number.

  Raises:
    ConfigError: The value is no finite number.
  """
  try:
    parsed = float(value)
  except ValueError:
    parsed = math.nan
  if not math.isfinite(parsed):
    raise ConfigError(name, value, "must be a number, such as 0.8")
  return parsed
