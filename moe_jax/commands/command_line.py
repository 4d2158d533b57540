"""Reads `--config=FILE --config.key=value ... --workdir=DIR`."""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
from collections.abc import Sequence

from absl import flags

from moe_jax import distributed
from moe_jax.commands.config_file import ROOT, expand, load_config
from moe_jax.errors import ConfigError, shorten

CHECK = "--check_determinism"
PRESET = "config.model.moe"  # the flag that takes a routing preset by name
# What absl and ml_collections raise of a command line; absl's own errors are ValueErrors or
# AttributeErrors.
_OVERRIDE_ERRORS = (
  flags.Error,
  AttributeError,
  KeyError,
  TypeError,
  ValueError,
  OverflowError,
  RecursionError,
  SyntaxError,
  MemoryError,
)


@dataclasses.dataclass(frozen=True)
class Command:
  """A command line, read.

  Attributes:
    config: resolved and locked.
    path: where it came from.
    workdir: None: not asked for.
    distributed: see `distributed.initialize`.
  """

  config: object
  path: str
  workdir: pathlib.Path | None
  distributed: str = distributed.DETECT


def parse(argv: Sequence[str], workdir: bool = True) -> Command:
  """Reads a command line.

  Args:
    argv: `argv[0]` is the program.
    workdir: whether there must be a --workdir; otherwise there is no such flag.

  Raises:
    ConfigError: a flag is missing, unknown or malformed; the config's file is missing or broken; an
      override names no key or has the wrong type.
  """
  for arg in argv:
    if "\0" in arg:
      raise ConfigError(
        "argument", arg, "holds a NUL character, which no name and no path can hold; leave it out"
      )
  path, rest = _take_config(argv)
  config = load_config(path)
  rest = _take_none(_take_preset(rest, config), config)
  _check_keys(rest, config)
  values = flags.FlagValues()
  if workdir:
    flags.DEFINE_string("workdir", None, "where the run lives", flag_values=values)
    flags.DEFINE_string(
      "distributed", distributed.DETECT, "how processes find each other", flag_values=values
    )
  try:
    positional = _override(config, rest, values)
  except flags.UnrecognizedFlagError as error:
    known = [
      "--config",
      "--config.KEY",
      *["--workdir", "--distributed", CHECK] * workdir,
      "--debug",
    ]
    raise ConfigError(
      "flag", f"--{error.flagname}", f"unknown; the flags are {', '.join(known)}"
    ) from error
  except _OVERRIDE_ERRORS as error:
    raise _override_error(rest, path, error) from error
  if positional:
    raise ConfigError(
      "argument", positional[0], "is no flag; write --flag=value, without spaces around the ="
    )
  if not workdir:
    return Command(config, path, None)
  if not values.workdir:
    raise ConfigError(
      "workdir",
      values.workdir,
      "is missing; say where the run shall live, as in --workdir=runs/quickstart",
    )
  return Command(config, path, expand("workdir", values.workdir), values.distributed)


def _override(config, args: Sequence[str], values) -> list[str]:
  """Writes the overrides of a command line into the config, its other flags into `values`; returns
  what is no flag."""
  from ml_collections import config_flags

  config_flags.DEFINE_config_dict(
    "config", config, flag_values=values, sys_argv=args, lock_config=True
  )
  return values(args)[1:]


def _take_config(argv: Sequence[str]) -> tuple[str, list[str]]:
  """`(value of --config, all other arguments)`."""
  path, rest, i = None, [], 0
  while i < len(argv):
    flag, equals, value = argv[i].partition("=")
    if flag in ("--config", "-config"):
      if not equals:
        i += 1
        value = argv[i] if i < len(argv) else ""
      path = value
    else:
      rest.append(argv[i])
    i += 1
  if not path:
    known = sorted(
      p.name for p in (ROOT / "configs").glob("*.py") if p.name not in ("base.py", "shared.py")
    )
    raise ConfigError(
      "config",
      path,
      "is missing; give --config=configs/X.py, X one of "
      + ", ".join(name.removesuffix(".py") for name in known),
    )
  return path, rest


def _take_preset(args: Sequence[str], config) -> list[str]:
  """Writes the presets that `--config.model.moe=NAME` names into the config; returns the other
  arguments."""
  from moe_jax import assembly

  rest = []
  for arg in args:
    flag, _, name = arg.partition("=")
    if flag.lstrip("-") == PRESET and flag.startswith("-"):
      assembly.use_preset(config, name)
    else:
      rest.append(arg)
  return rest


def _take_none(args: Sequence[str], config) -> list[str]:
  """Writes None where the last word on a key that may be None is `None`; returns the arguments on
  other keys.

  ml_collections reads the text after = as the key's type, of which None is not.
  """
  from moe_jax.assembly.sections import KEYS

  rest = list(args)
  for key in (name for name, key in KEYS.items() if key.optional):
    flags = (f"--config.{key}", f"-config.{key}")
    given = []  # (place, number of arguments, value)
    for i, arg in enumerate(rest):
      flag, equals, value = arg.partition("=")
      if flag in flags and (equals or i + 1 < len(rest)):
        given.append((i, 1 if equals else 2, value if equals else rest[i + 1]))
    said = [value.strip().lower() == "none" for *_, value in given]
    if said and said[-1]:
      _branch(config, key)[key.rpartition(".")[2]] = None
    gone = {
      place + n
      for (place, number, _), none in zip(given, said, strict=True)
      for n in range(number)
      if none or said[-1]
    }
    rest = [arg for i, arg in enumerate(rest) if i not in gone]
  return rest


def _check_keys(args: Sequence[str], config) -> None:
  """Refuses `--config.KEY` if there is no such key, with the nearest one that there is."""
  for arg in args:
    flag, equals, value = arg.lstrip("-").partition("=")
    if not arg.startswith("-") or not flag.removeprefix("no").startswith("config."):
      continue
    key = flag.removeprefix("no").removeprefix("config.")
    known = _keys(config)
    if key not in known:
      leaf = {k.rpartition(".")[2]: k for k in reversed(known)}
      near = difflib.get_close_matches(key, known, 1) or [
        leaf[n] for n in difflib.get_close_matches(key.rpartition(".")[2], leaf, 1)
      ]
      raise ConfigError(
        key,
        value if equals else "",
        "there is no such key; "
        + (f"did you mean {near[0]}?" if near else "configs/base.py lists all keys"),
      )
    if hasattr(_branch(config, key + "."), "items"):
      raise ConfigError(key, value if equals else "", _instead(key, value, config))


def _instead(key: str, value: str, config) -> str:
  """What to say where `--config.KEY=VALUE` names a branch."""
  from moe_jax import assembly

  holds = "holds other keys and is no value itself; "
  if value in assembly.PRESETS:
    return f"{holds}{value} is a routing preset, which is --{PRESET}={value}"
  branch = _branch(config, key + ".")
  if "name" in branch:
    return f"{holds}use --config.{key}.name={value if value in branch else branch['name']}"
  inside = _keys(branch)
  return f"{holds}" + (
    f"use one of them, such as --config.{key}.{inside[0]}" if inside else "it has none"
  )


def _override_error(args: Sequence[str], path: str, error: Exception) -> ConfigError:
  """What is wrong with the override that `error` (of absl or config_flags) complains about: the
  first that fails alone."""
  for i, arg in enumerate(args[1:], 1):
    flag, equals, value = arg.partition("=")
    key = flag.lstrip("-").removeprefix("config.")
    if not flag.startswith("-") or not flag.lstrip("-").startswith("config."):
      continue
    one, config = args[i : i + 1 + (not equals)], load_config(path)
    try:
      _override(config, [args[0], *one], flags.FlagValues())
    except _OVERRIDE_ERRORS as wrong:
      if not equals and len(one) == 1 or key not in _keys(config):
        return ConfigError("flag", arg, f"{wrong}; write --config.KEY=VALUE")
      before = _branch(config, key)[key.rpartition(".")[2]]
      kind = (
        "a number, or None"
        if before is None
        else f"of type {type(before).__name__}, as in {before!r}"
      )
      return ConfigError(key, value if equals else one[-1], f"must be {kind}")
  return ConfigError("flag", shorten(" ".join(args[1:])), shorten(str(error)))


def _keys(config, prefix: str = "") -> list[str]:
  """All dotted keys, branches too."""
  found = []
  for key, value in config.items():
    found.append(prefix + key)
    found += _keys(value, prefix + key + ".") if hasattr(value, "items") else []
  return found


def _branch(config, key: str):
  """The branch that holds a dotted key; of a key that ends with a dot, what it holds itself."""
  for name in key.split(".")[:-1]:
    config = config[name]
  return config
