"""Train a model: `python -m moe_jax.train --config=configs/quickstart.py --workdir=DIR [--config.key=value] [--debug]`.

On a pod or a cluster each process runs this same command (`moe_jax/distributed.py`); --distributed=HOST:PORT,N,INDEX
where nothing in the environment says how they find each other.

`--config.model.moe=NAME` puts the routing of a paper into the config; `python -m moe_jax.routers` lists the names.

The same command on the same workdir goes on where the run stopped. Ctrl-C or SIGTERM saves and stops, as does
--config.train.max_minutes=N, for queues that end a job by the clock. --check_determinism does the first step twice,
compares all bits and writes nothing.

Exit codes: 0 the run is done, or was stopped and saved (results.json is there once it is done); 1 a mistake of the
program, with a traceback; 2 the command, the data or the disk is wrong, told in one sentence; 3 training has diverged:
a loss, a gradient or a weight is no longer finite; 4 --check_determinism found a difference; 130 interrupted at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import logging
import pathlib
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence

from moe_jax import distributed
from moe_jax.errors import EXIT_DIVERGED, EXIT_INPUT, ConfigError, Diverged

CHECK = "--check_determinism"
EXIT_DIFFERENT = 4  # --check_determinism found a difference
PRESET = "config.model.moe"  # the flag that takes a routing preset by name
ROOT = pathlib.Path(__file__).resolve().parent.parent  # of the clone, where configs/ is


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


def run() -> None:
  """The console entry point."""
  sys.exit(main(sys.argv))


def main(argv: Sequence[str]) -> int:
  """Does what the command line says; returns the exit code."""
  def action(rest):
    return _train(parse([arg for arg in rest if arg != CHECK]), argv, check=CHECK in rest)
  return guarded(argv, __doc__, action)


def guarded(argv: Sequence[str], text: str, action: Callable[[Sequence[str]], int]) -> int:
  """The exit code of `action` on the command line without --debug, or of its mistake, told on standard error.

  Args:
    argv: the command line.
    text: printed for --help.
    action: takes the arguments; returns the exit code.
  """
  if any(arg in ("-h", "--help", "--helpfull") for arg in argv[1:]):
    print(text)
    return 0
  debug = "--debug" in argv
  try:
    return action([arg for arg in argv if arg != "--debug"])
  except ConfigError as error:
    code, said = EXIT_INPUT, str(error)
    shown = traceback.format_exc() if debug else ""
  except Diverged as error:
    code, said = EXIT_DIVERGED, str(error)
    shown = traceback.format_exc() if debug else ""
  except KeyboardInterrupt:
    code, said, shown = 130, "interrupted; what was saved before is kept, and the same command goes on from there", ""
  print(f"{shown}error: {' '.join(said.split())}", file=sys.stderr, flush=True)
  return code


def _train(command: Command, argv: Sequence[str], check: bool = False) -> int:
  """Cheap checks first; Orbax and Grain are imported only once they have passed."""
  import jax

  from moe_jax import build
  from moe_jax.training import workdir
  config = command.config
  distributed.initialize(command.distributed)
  build.validate(config, jax.device_count())
  workdir.check(command.workdir, config)

  from absl import flags
  from absl import logging as absl_logging
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # Grain's workers read absl's flags
  absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax warns of what is as it should be
  logging.getLogger("jax").setLevel(logging.WARNING)
  from moe_jax.training import loop
  with distributed.together():
    if check:
      return _check_determinism(loop.determinism(config))
    line = "python -m moe_jax.train " + shlex.join(argv[1:])
    loop.train(config, command.workdir, {"config": command.path, "command": line})
  return 0


def _check_determinism(different: Sequence[str]) -> int:
  """Prints what --check_determinism found; returns the exit code."""
  if not different:
    print("the first step was done twice and gave the same bits each time")
    return 0
  print(f"error: the first step was done twice, and {len(different)} arrays differ; the first is {different[0]}; on a "
        "GPU, XLA_FLAGS=--xla_gpu_deterministic_ops=true makes every operation deterministic", file=sys.stderr)
  return EXIT_DIFFERENT


def parse(argv: Sequence[str], workdir: bool = True) -> Command:
  """Reads a command line.

  Args:
    argv: `argv[0]` is the program.
    workdir: whether there must be a --workdir; otherwise there is no such flag.

  Raises:
    ConfigError: a flag is missing, unknown or malformed; the config's file is missing or broken; an override names no
      key or has the wrong type.
  """
  from absl import flags
  from ml_collections import config_flags
  path, rest = _take_config(argv)
  config = load_config(path)
  rest = _take_preset(rest, config)
  _check_keys(rest, config)
  values = flags.FlagValues()
  if workdir:
    flags.DEFINE_string("workdir", None, "where the run lives", flag_values=values)
    flags.DEFINE_string("distributed", distributed.DETECT, "how processes find each other", flag_values=values)
  try:
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=rest, lock_config=True)
    positional = values(rest)[1:]
  except flags.UnrecognizedFlagError as error:
    known = ["--config", "--config.KEY", *["--workdir", "--distributed", CHECK] * workdir, "--debug"]
    raise ConfigError("flag", f"--{error.flagname}", f"unknown; the flags are {', '.join(known)}") from error
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
    raise _override_error(rest, config, error) from error
  if positional:
    raise ConfigError("argument", positional[0], "is no flag; write --flag=value, without spaces around the =")
  if not workdir:
    return Command(config, path, None)
  if not values.workdir:
    raise ConfigError("workdir", values.workdir, "is missing; say where the run shall live, as in "
                      "--workdir=runs/quickstart")
  return Command(config, path, pathlib.Path(values.workdir).expanduser(), values.distributed)


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
    known = sorted(p.name for p in (ROOT / "configs").glob("*.py") if p.name not in ("base.py", "shared.py"))
    raise ConfigError("config", path, "is missing; give --config=configs/X.py, X one of " + ", ".join(
        name.removesuffix(".py") for name in known))
  return path, rest


def _take_preset(args: Sequence[str], config) -> list[str]:
  """Writes the presets that `--config.model.moe=NAME` names into the config; returns the other arguments."""
  from moe_jax import build
  rest = []
  for arg in args:
    flag, _, name = arg.partition("=")
    if flag.lstrip("-") == PRESET and flag.startswith("-"):
      build.use_preset(config, name)
    else:
      rest.append(arg)
  return rest


def load_config(path: str):
  """The ConfigDict of `FILE.py[:VARIANT]`: `get_config()`, or `get_config(VARIANT)`.

  Args:
    path: relative to the working directory or, failing that, to the clone or its `configs/`.

  Raises:
    ConfigError: there is no such file, or it does not define a config.
  """
  name, colon, variant = path.partition(":")
  tried = [pathlib.Path(name).expanduser(), ROOT / name, ROOT / "configs" / name]
  file = next((p for p in tried if p.is_file()), None)
  if file is None:
    known = {str(p.relative_to(ROOT)): p for p in (ROOT / "configs").glob("*.py")}
    near = difflib.get_close_matches(f"configs/{pathlib.Path(name).stem}.py", known, 1)
    raise ConfigError("config", path, "there is no such file" + (f"; did you mean {near[0]}?" if near else
                      "; give the path of a config such as configs/quickstart.py"))
  for place in (str(ROOT), str(file.resolve().parent.parent)):  # so that it can say `from configs import base`
    if place not in sys.path:
      sys.path.append(place)
  try:
    spec = importlib.util.spec_from_file_location("_config", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(*([variant] if colon else []))
    config.lock()
    config.to_dict()
  except ConfigError:
    raise
  except Exception as error:  # whatever a user's Python file may raise
    raise ConfigError("config", path, f"{type(error).__name__}: {error}; the file must define get_config(), or "
                      "get_config(variant) for a :variant, returning a ConfigDict (see configs/base.py)") from error
  return config


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
          leaf[n] for n in difflib.get_close_matches(key.rpartition(".")[2], leaf, 1)]
      raise ConfigError(key, value if equals else "", "there is no such key; " + (
          f"did you mean {near[0]}?" if near else "configs/base.py lists all keys"))


def _override_error(args: Sequence[str], config, error: Exception) -> ConfigError:
  """What is wrong with the override that `error` (of absl or config_flags) complains about."""
  for arg in args:
    flag, equals, value = arg.partition("=")
    key = flag.lstrip("-").removeprefix("config.")
    if flag.startswith("-") and key in _keys(config) and f"{flag.lstrip('-')}={value}" in str(error):
      before = _get(config, key)
      kind = "a number" if before is None else f"of type {type(before).__name__}, as in {before!r}"
      return ConfigError(key, value, f"must be {kind}")
  return ConfigError("flag", " ".join(args[1:]), str(error))


def _keys(config, prefix: str = "") -> list[str]:
  """All dotted keys, branches too."""
  found = []
  for key, value in config.items():
    found.append(prefix + key)
    found += _keys(value, prefix + key + ".") if hasattr(value, "items") else []
  return found


def _get(config, key: str):
  for name in key.split("."):
    config = config[name]
  return config


if __name__ == "__main__":
  run()
