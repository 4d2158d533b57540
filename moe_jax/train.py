"""Train a model: `python -m moe_jax.train --config=configs/quickstart.py --workdir=DIR
[--config.key=value] [--debug]`.

On a pod or a cluster each process runs this same command (`moe_jax/distributed.py`);
--distributed=HOST:PORT,N,INDEX where nothing in the environment says how they find each other.

`--config.model.moe=NAME` puts the routing of a paper into the config; `python -m moe_jax.routers`
lists the names.

The same command on the same workdir goes on where the run stopped. Ctrl-C or SIGTERM saves and
stops, as does --config.train.max_minutes=N, for queues that end a job by the clock.
--check_determinism does the first step twice, compares all bits and writes nothing.

Exit codes: 0 the run is done, or was stopped and saved (results.json is there once it is done); 1
the machine lacks something, told in one sentence, or the program is at fault, told with a
traceback; 2 the command, the data or the disk is wrong, told in one sentence; 3 training has
diverged: a loss, a gradient or a weight is no longer finite; 4 --check_determinism found a
difference; 130 interrupted at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import importlib.util
import logging
import os
import pathlib
import select
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence

from absl import flags

from moe_jax import distributed
from moe_jax.errors import EXIT_DIVERGED, EXIT_INPUT, ConfigError, Diverged, shorten, shown

CHECK = "--check_determinism"
EXIT_DIFFERENT = 4  # --check_determinism found a difference
PRESET = "config.model.moe"  # the flag that takes a routing preset by name
ROOT = pathlib.Path(__file__).resolve().parent.parent  # of the clone, where configs/ is
LARGEST_CONFIG = 1_000_000  # bytes
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


def run() -> None:
  """The console entry point."""
  sys.exit(main(sys.argv))


def main(argv: Sequence[str]) -> int:
  """Does what the command line says; returns the exit code."""

  def action(rest):
    return _train(parse([arg for arg in rest if arg != CHECK]), argv, check=CHECK in rest)

  return guarded(argv, __doc__, action)


def guarded(argv: Sequence[str], text: str | None, action: Callable[[Sequence[str]], int]) -> int:
  """The exit code of `action` on the command line without --debug, or of its mistake, told on
  standard error.

  The last resort of every command. 2: the command is wrong, told in one sentence. 1: the machine
  lacks memory or room, told in one sentence; or the program is at fault, told by a traceback and
  one sentence. 3: training has diverged. 130: Ctrl-C. Output that nobody reads any more, as in `|
  head`, is no mistake.

  Args:
    argv: the command line.
    text: printed for --help; None: `action` does that itself.
    action: takes the arguments; returns the exit code.
  """
  if text is not None and any(arg in ("-h", "--help", "--helpfull") for arg in argv[1:]):
    print(text)
    return 0
  debug = "--debug" in argv
  try:
    code = action([arg for arg in argv if arg != "--debug"])
    sys.stdout.flush()  # or Python would only find out at its end that nobody reads it
    return code
  except (Exception, KeyboardInterrupt) as error:
    if isinstance(error, BrokenPipeError) and _nobody_reads():
      with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())  # for what Python flushes at its end
      return 0  # whoever reads the output has enough, as in `| head`
    code, said, expected = _told(error)
    trace = "" if expected and not debug else traceback.format_exc()
  print(f"{trace}error: {' '.join(said.split())}", file=sys.stderr, flush=True)
  return code


def _nobody_reads() -> bool:
  """Whether standard output is a pipe that nobody reads any more; other pipes break, too."""
  try:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))
  except (OSError, ValueError):  # it is no file, as under a test
    return False


_KEPT = "what was saved before is kept, and the same command goes on from there"
# What the machine lacks, which is no fault of the program.
_OF_THE_MACHINE = (
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EFBIG,
  errno.EROFS,
  errno.EACCES,
  errno.EPERM,
  errno.EIO,
  errno.ENAMETOOLONG,
  errno.EMFILE,
  errno.ENFILE,
  errno.ENOMEM,
  errno.ESTALE,
  errno.ELOOP,
)


def _told(error: BaseException) -> tuple[int, str, bool]:
  """`(exit code, sentence, whether the sentence says it all)`; a fault of the program also needs
  its traceback."""
  if isinstance(error, ConfigError):
    return EXIT_INPUT, str(error), True
  if isinstance(error, Diverged):
    return EXIT_DIVERGED, str(error), True
  if isinstance(error, KeyboardInterrupt):
    return 130, f"interrupted; {_KEPT}", True
  if isinstance(error, MemoryError):
    return (
      1,
      f"there is not enough memory; {_KEPT} on a larger machine, or with a smaller "
      "train.batch_size",
      True,
    )
  if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
    where = f"{error.filename}: " if error.filename else ""
    return 1, f"{where}{error.strerror}; {_KEPT} once that is mended", True
  return (
    1,
    (
      f"{type(error).__name__}: {shorten(str(error))}. This is a bug of the program and no mistake "
      f"of yours: please report it with the lines above; {_KEPT}"
    ),
    False,
  )


def _train(command: Command, argv: Sequence[str], check: bool = False) -> int:
  """Cheap checks first; Orbax and Grain are imported only once they have passed."""
  import jax

  from moe_jax import assembly
  from moe_jax.training import workdir

  config = command.config
  distributed.initialize(command.distributed)
  assembly.validate(config, jax.device_count())
  workdir.check(command.workdir, config)

  from absl import logging as absl_logging

  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # Grain's workers read absl's flags
  # Orbax warns of what is as it should be, and logs as errors what it also raises.
  absl_logging.set_verbosity(absl_logging.FATAL)
  logging.getLogger("jax").setLevel(logging.WARNING)
  from moe_jax.run import loop

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
  print(
    f"error: the first step was done twice, and {len(different)} arrays differ; the first is "
    f"{different[0]}; on a GPU, XLA_FLAGS=--xla_gpu_deterministic_ops=true makes every operation "
    "deterministic",
    file=sys.stderr,
  )
  return EXIT_DIFFERENT


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
  return Command(config, path, _expand("workdir", values.workdir), values.distributed)


def _override(config, args: Sequence[str], values) -> list[str]:
  """Writes the overrides of a command line into the config, its other flags into `values`; returns
  what is no flag."""
  from ml_collections import config_flags

  config_flags.DEFINE_config_dict(
    "config", config, flag_values=values, sys_argv=args, lock_config=True
  )
  return values(args)[1:]


def _expand(flag: str, path: str) -> pathlib.Path:
  try:
    return pathlib.Path(path).expanduser()
  except RuntimeError as error:
    raise ConfigError(flag, path, f"{error}; give the path without ~") from error


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


def load_config(path: str):
  """The ConfigDict of `FILE.py[:VARIANT]`: `get_config()`, or `get_config(VARIANT)`.

  Args:
    path: relative to the working directory or, failing that, to the clone or its `configs/`.

  Raises:
    ConfigError: there is no such file, or it does not define a config.
  """
  from moe_jax.assembly.sections import check_config

  name, colon, variant = path.partition(":")
  file = _find_config(path, name)
  for place in (
    str(ROOT),
    str(file.resolve().parent.parent),
  ):  # so that it can say `from configs import base`
    if place not in sys.path:
      sys.path.append(place)
  try:
    spec = importlib.util.spec_from_file_location("_config", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(*([variant] if colon else []))
    if hasattr(config, "lock"):
      config.lock()
      config.to_dict()  # whose values may be computed from others
  except ConfigError:
    raise
  except (Exception, SystemExit) as error:  # whatever a user's Python file may raise
    raise ConfigError(
      "config",
      path,
      f"{type(error).__name__}: {shorten(str(error))}; the file must define "
      "get_config(), or get_config(variant) for a :variant, returning a ConfigDict (see "
      "configs/base.py)",
    ) from error
  try:
    check_config(config)
  except ConfigError as error:
    if error.field != "config":
      raise
    raise ConfigError(
      "config",
      path,
      f"its get_config() returns {shown(config)}, and must return a ConfigDict (see "
      "configs/base.py)",
    ) from error
  return config


def _find_config(path: str, name: str) -> pathlib.Path:
  """The file that `--config=path` names, whose part before a colon is `name`."""
  tried = [_expand("config", name), ROOT / name, ROOT / "configs" / name]
  try:
    file = next((p for p in tried if p.is_file()), None)
    size = file.stat().st_size if file else 0
  except OSError as error:  # a name that is too long
    raise ConfigError(
      "config", path, f"{error.strerror}; give the path of a config such as configs/quickstart.py"
    ) from error
  if file is None:
    if tried[0].is_dir():
      raise ConfigError(
        "config", path, "is a directory; give a file in it, such as configs/quickstart.py"
      )
    near = difflib.get_close_matches(
      pathlib.Path(name).stem, [p.stem for p in (ROOT / "configs").glob("*.py")], 1
    )
    raise ConfigError(
      "config",
      path,
      "there is no such file"
      + (
        f"; did you mean configs/{near[0]}.py?"
        if near
        else "; give the path of a config such as configs/quickstart.py"
      ),
    )
  if file.suffix != ".py" or size > LARGEST_CONFIG:
    raise ConfigError(
      "config",
      path,
      f"must be a Python file, *.py, of at most {LARGEST_CONFIG:,} bytes, such as "
      "configs/quickstart.py",
    )
  return file


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


if __name__ == "__main__":
  run()
