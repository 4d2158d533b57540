"""How a command ends: its exit code, and the one sentence that tells a mistake."""

from __future__ import annotations

import errno
import os
import select
import sys
import traceback
from collections.abc import Callable, Sequence

from moe_jax.errors import EXIT_DIVERGED, EXIT_INPUT, ConfigError, Diverged, shorten


def guarded(argv: Sequence[str], text: str | None, action: Callable[[Sequence[str]], int]) -> int:
  """Returns the exit code of a command, whose mistakes are told on standard error.

  0: the command has done what it should. 2: the command line, the data or the disk is wrong, which
  one sentence says. 1: the machine lacks memory or room, which one sentence says; or the program is
  at fault, which a traceback shows. 3: training has diverged. 130: Ctrl-C. It is no mistake if
  nobody reads the output any more, as in `| head`.

  Args:
    argv: The command line, program included. `--debug` adds the traceback to every mistake.
    text: What `--help` prints; None means that `action` does that itself. `--help=SECTION` prints
      the options of that section of a config.
    action: Takes the command line without `--debug` and returns the exit code.
  """
  if text is not None and any(arg in ("-h", "--help", "--helpfull") for arg in argv[1:]):
    print(text)
    return 0
  debug = "--debug" in argv
  try:
    if sections := [arg.partition("=")[2] for arg in argv[1:] if arg.startswith("--help=")]:
      from moe_jax.commands.help import section_text  # it knows all options, which takes a second

      print(section_text(sections[0]))
      return 0
    code = action([arg for arg in argv if arg != "--debug"])
    # Without this, Python would find out only at its end that nobody reads the output.
    sys.stdout.flush()
    return code
  except (Exception, KeyboardInterrupt) as error:
    if isinstance(error, BrokenPipeError) and _nobody_reads():
      # Python flushes standard output at its end, which must not fail again.
      with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
      return 0
    code, sentence, is_enough = _describe(error)
    trace = "" if is_enough and not debug else traceback.format_exc()
  print(f"{trace}error: {' '.join(sentence.split())}", file=sys.stderr, flush=True)
  return code


def _nobody_reads() -> bool:
  """Returns whether standard output is a pipe that nobody reads any more.

  Other pipes break, too, and those are mistakes.
  """
  try:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))
  except (OSError, ValueError):  # it is no file, as under a test
    return False


_KEPT = "what was saved before is kept, and the same command goes on from there"
# Errors of the operating system that say what the machine lacks. They are no fault of the program.
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


def _describe(error: BaseException) -> tuple[int, str, bool]:
  """Returns the exit code, one sentence, and whether the sentence is enough without a traceback."""
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
