"""How mistakes, faults and broken pipes end a command."""

import errno
import pathlib
import subprocess
import sys

import pytest

from moe_jax import commands
from moe_jax.errors import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
  "error, code, words",
  [
    (
      OSError(errno.ENOSPC, "No space left on device", "x/y"),
      1,
      ["x/y: No space left", "saved before is kept"],
    ),
    (PermissionError(errno.EACCES, "Permission denied", "z"), 1, ["z: Permission denied"]),
    (MemoryError(), 1, ["not enough memory", "kept"]),
    (KeyboardInterrupt(), 130, ["interrupted"]),
    (ConfigError("a", 1, "must be 2"), 2, ["a=1: must be 2"]),
  ],
)
def test_what_is_no_bug_is_told_in_one_sentence(capsys, error, code, words):
  # Catches 459 lines of traceback for a disk that is full.
  def action(rest):
    raise error

  assert commands.guarded(["x"], "", action) == code
  said = capsys.readouterr().err
  assert (
    said.startswith("error: ") and said.count("\n") == 1 and all(word in said for word in words)
  )


def test_a_bug_is_told_with_its_traceback(capsys):
  # Catches a fault of the program that looks like a mistake of the user, or leaves no trace.
  def action(rest):
    raise KeyError("surprise")

  assert commands.guarded(["x"], "", action) == 1
  said = capsys.readouterr().err
  assert "Traceback" in said and "in action" in said
  assert (
    said.splitlines()[-1].startswith("error: KeyError: 'surprise'")
    and "is a bug" in said
    and "kept" in said
  )


def test_nobody_reads_the_output(tmp_path):
  # Catches a traceback of BrokenPipeError under `| head`, also of Python's own flush at its end.
  code = (
    "import sys; from moe_jax import commands; "
    "sys.exit(commands.guarded(['x'], '', lambda _: print('x' * 9**6) or 0))"
  )
  done = subprocess.run(
    ["bash", "-c", 'set -o pipefail; "$0" -c "$1" | head -c 1', sys.executable, code],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert (done.returncode, done.stdout, done.stderr) == (0, "x", "")


def test_another_pipe_that_breaks_is_a_bug(capsys):
  # Catches a process that died unseen, taken for a reader of the output that has enough.
  def action(rest):
    raise BrokenPipeError(errno.EPIPE, "Broken pipe")

  assert commands.guarded(["x"], "", action) == 1
  assert "is a bug" in capsys.readouterr().err


def test_help_of_a_section(capsys):
  # Catches a section whose options are not printed, and an unknown one that ends in a traceback.
  assert commands.guarded(["x", "--help=optimizer"], "", len) == 0
  printed = capsys.readouterr().out
  assert "--config.optimizer.learning_rate=0.001\n    The peak of the schedule." in printed
  assert commands.guarded(["x", "--help=optimiser"], "", len) == 2
  assert "did you mean 'optimizer'" in capsys.readouterr().err
