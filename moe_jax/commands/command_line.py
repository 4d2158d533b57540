"""Reads `--config=FILE --config.key=value ... --workdir=DIR`."""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
from collections.abc import Sequence

from absl import flags

from moe_jax import distributed
from moe_jax.commands.config_file import config_names, expand, load_config
from moe_jax.commands.flags import Flag, take_flags
from moe_jax.errors import ConfigError, shorten
from moe_jax.options import Config

PRESET = "config.model.moe"  # the flag that takes a routing preset by name
# Names that users of other programs expect -> the key that means the same.
_OTHER_NAMES = {"lr": "learning_rate", "num_steps": "steps", "max_steps": "steps"}
# The exceptions that absl and ml_collections raise about a command line. Errors of absl are
# ValueErrors or AttributeErrors.
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
  """What a command line says.

  Attributes:
    config: The config with all overrides, locked.
    path: The value of --config.
    workdir: The value of --workdir; None where the command has no such flag.
    distributed: The value of --distributed; see `distributed.initialize`.
  """

  config: Config
  path: str
  workdir: pathlib.Path | None
  distributed: str = distributed.DETECT


def parse(argv: Sequence[str], workdir: bool = True, others: Sequence[Flag] = ()) -> Command:
  """Reads the command line of a command that works on a config.

  Args:
    argv: The command line; `argv[0]` is the program.
    workdir: Whether the command needs a --workdir; otherwise it has no such flag.
    others: The command's other flags, which are taken from `argv` already. An error lists them.

  Raises:
    ConfigError: A flag is missing, unknown or malformed; the config's file is missing or broken; or
      an override names no key or has a value of the wrong type.
  """
  for arg in argv:
    if "\0" in arg:
      raise ConfigError(
        "argument", arg, "holds a NUL character, which no name and no path can hold; leave it out"
      )
  path, rest = _take_config(argv)
  router, rest = _take_router(rest)
  config = load_config(path)
  rest = _take_none(_take_preset(rest, config), config)
  if router:
    _branch(config, "model.moe.router.name").name = router
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
    if remedy := _flag_of_key(error.flagname, rest, config):
      raise ConfigError("flag", f"--{error.flagname}", remedy) from error
    known = [
      "--config",
      "--config.KEY",
      "--router",
      *["--workdir", "--distributed"] * workdir,
      *(f"--{flag.name}" for flag in others),
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


def _override(config: Config, args: Sequence[str], values) -> list[str]:
  """Writes overrides into the config and other flags into `values`; returns what is no flag."""
  from ml_collections import config_flags

  config_flags.DEFINE_config_dict(
    "config", config, flag_values=values, sys_argv=list(args), lock_config=True
  )
  return values(args)[1:]


def _take_config(argv: Sequence[str]) -> tuple[str, list[str]]:
  """Returns the value of --config and all other arguments."""
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
    raise ConfigError(
      "config", path, f"is missing; give --config=NAME, one of {', '.join(config_names())}"
    )
  return path, rest


def _take_router(args: Sequence[str]) -> tuple[str, list[str]]:
  """Registers the router of `--router=FILE.py:NAME`; returns its name, and the other arguments.

  It must be known before the config is loaded, which then has the router's options. The name is ""
  without such a flag.
  """
  values, rest = take_flags(args, (Flag("router"),), passes=True)
  if "router" not in values:
    return "", rest
  from moe_jax.assembly.sections import register_router
  from moe_jax.commands.router_file import load_router

  name, router = load_router(values["router"])
  register_router(name, router)
  return name, rest


def _take_preset(args: Sequence[str], config: Config) -> list[str]:
  """Writes the presets of `--config.model.moe=NAME` into the config; returns what is left."""
  from moe_jax import assembly

  # A dense model takes no preset, and an override may give it experts.
  for arg in args:
    flag, _, value = arg.partition("=")
    if flag.lstrip("-") == f"{PRESET}.num_experts" and value.isdecimal() and len(value) < 9:
      _branch(config, "model.moe.num_experts").num_experts = int(value)
  rest = []
  for arg in args:
    flag, _, name = arg.partition("=")
    if flag.lstrip("-") == PRESET and flag.startswith("-"):
      assembly.use_preset(config, name)
    else:
      rest.append(arg)
  return rest


def _take_none(args: Sequence[str], config: Config) -> list[str]:
  """Writes None into keys whose last override is `None`; returns the other arguments.

  ml_collections could not do it: it reads the text after = as a value of the key's type.
  """
  from moe_jax.assembly.sections import optional_keys

  rest = list(args)
  for key in sorted(optional_keys()):
    flags = (f"--config.{key}", f"-config.{key}")
    # For each override of this key: its place, how many arguments it takes, and its value.
    overrides = []
    for i, arg in enumerate(rest):
      flag, equals, value = arg.partition("=")
      if flag in flags and (equals or i + 1 < len(rest)):
        overrides.append((i, 1 if equals else 2, value if equals else rest[i + 1]))
    are_none = [value.strip().lower() == "none" for *_, value in overrides]
    if are_none and are_none[-1]:
      _branch(config, key)[key.rpartition(".")[2]] = None
    gone = {
      place + n
      for (place, number, _), is_none in zip(overrides, are_none, strict=True)
      for n in range(number)
      if is_none or are_none[-1]
    }
    rest = [arg for i, arg in enumerate(rest) if i not in gone]
  return rest


def _check_keys(args: Sequence[str], config: Config) -> None:
  """Raises ConfigError, which proposes the nearest key, if `--config.KEY` names no key."""
  for arg in args:
    flag, equals, value = arg.lstrip("-").partition("=")
    if not arg.startswith("-") or not flag.removeprefix("no").startswith("config."):
      continue
    key = flag.removeprefix("no").removeprefix("config.")
    known = _keys(config)
    if key not in known:
      leaf = {k.rpartition(".")[2]: k for k in reversed(known)}
      near = difflib.get_close_matches(key, known, 1, cutoff=0.8) or [
        leaf[n] for n in difflib.get_close_matches(key.rpartition(".")[2], leaf, 1)
      ]
      raise ConfigError(
        key,
        value if equals else "",
        "there is no such key; "
        + (f"did you mean {near[0]}?" if near else "docs/options.md and --help=all list all keys"),
      )
    if hasattr(_branch(config, key + "."), "items"):
      raise ConfigError(key, value if equals else "", _instead(key, value, config))


def _flag_of_key(name: str, args: Sequence[str], config: Config) -> str:
  """Returns the remedy for `--NAME=VALUE` where NAME is the last part of a key; "" if of none."""
  wanted = name.replace("-", "_")
  wanted = _OTHER_NAMES.get(wanted, wanted)
  keys = [
    key
    for key in _keys(config)
    if key.rpartition(".")[2] == wanted
    and not hasattr(_branch(config, key + "."), "items")
    # --workdir is a flag of other commands, and not the workdir of a teacher.
    and wanted != "workdir"
  ]
  # `seed` itself is meant rather than the seed of a router, which lies deeper.
  depth = min((key.count(".") for key in keys), default=0)
  keys = [key for key in keys if key.count(".") == depth]
  given = (arg.partition("=") for arg in args if arg.lstrip("-").partition("=")[0] == name)
  value = next((value for _, equals, value in given if equals), "VALUE")
  # A name such as "k", which many routers have, is part of so many keys that it tells nothing.
  if not 0 < len(keys) <= 3:
    return ""
  listed = " or ".join(f"--config.{key}={shorten(value)}" for key in keys)
  return f"is no flag of its own but a key of the config; write {listed}"


def _instead(key: str, value: str, config: Config) -> str:
  """Returns the remedy where `--config.KEY=VALUE` names a section instead of a key."""
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
  """Returns what is wrong with the overrides that `error` complains about.

  absl and config_flags do not say which override they mean, so each one is tried alone, and the
  first that fails is reported.
  """
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


def _keys(config: Config, prefix: str = "") -> list[str]:
  """Returns all dotted keys, sections included."""
  found = []
  for key, value in config.items():
    found.append(prefix + key)
    found += _keys(value, prefix + key + ".") if hasattr(value, "items") else []
  return found


def _branch(config: Config, key: str) -> Config:
  """Returns the section that holds a dotted key; a key that ends with a dot is a section itself."""
  for name in key.split(".")[:-1]:
    config = config[name]
  return config
