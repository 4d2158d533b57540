"""Tests what `moe_jax.inspect` prints of a workdir, and of a directory that is no workdir."""

import jax
import jax.numpy as jnp
import pytest
import tiny

from moe_jax import inspect as inspection
from moe_jax.training import checkpoints, workdir
from moe_jax.training.state import TrainState

pytestmark = pytest.mark.unit


def make(tmp_path, weight=1.0):
  """Returns a workdir with one checkpoint, whose 6 weights all have the value `weight`."""
  place = tmp_path / "run"
  config = tiny.config(tmp_path)
  workdir.claim(place, config)
  workdir.note_start(
    place,
    config,
    {"config": "configs/x.py", "data": {"embedded:prose": "ab"}, "tokenizer": "t"},
    {"command": "train", "step": 0, "devices": "1 x cpu"},
  )
  state = TrainState(
    step=jnp.int32(3),
    params={"w": jnp.full((2, 3), weight)},
    opt_state=(),
    router_state={},
    rng=jax.random.key(0),
  )
  with checkpoints.Checkpoints(place / "checkpoints") as c:
    c.save(3, state, {}, {"seconds": 1.0})
  return place


def test_says_what_a_workdir_holds(tmp_path, capsys):
  # Catches the loss of a field that other commands and scripts read.
  place = make(tmp_path)
  assert inspection.main(["inspect", str(place)]) == 0
  fields = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
  assert fields["step"] == "3" and fields["checkpoints"] == "3"
  assert fields["config"] == "configs/x.py" and fields["parameters"] == "6"
  assert fields["data embedded:prose"] == "ab" and "jax " in fields["versions"]
  assert fields["parameters_sha256"] == checkpoints.parameters_sha256({"w": jnp.ones((2, 3))})
  assert len(fields["parameters_sha256"]) == 64


def test_other_weights_have_another_hash(tmp_path):
  # Catches a hash of names and shapes only.
  a, b = make(tmp_path / "a"), make(tmp_path / "b", weight=1.0000001)
  assert inspection.describe(a)["parameters_sha256"] != inspection.describe(b)["parameters_sha256"]


def test_a_run_without_checkpoints(tmp_path, capsys):
  # Catches a traceback for a run that was killed before its first save.
  workdir.claim(tmp_path / "run", tiny.config(tmp_path))
  assert inspection.main(["inspect", str(tmp_path / "run")]) == 0
  assert "checkpoints: none" in capsys.readouterr().out


@pytest.mark.parametrize(
  "what, words",
  [
    ("nowhere", "no such directory"),
    ("empty", "no config.json"),
    ("file", "a file"),
    ("damaged", "cannot be read"),
  ],
)
def test_what_is_no_workdir(tmp_path, capsys, what, words):
  # Catches a traceback, and the exit code 0.
  (tmp_path / "empty").mkdir()
  (tmp_path / "file").write_text("")
  workdir.claim(tmp_path / "damaged", tiny.config(tmp_path))
  (tmp_path / "damaged" / "checkpoints" / "2" / "state").mkdir(parents=True)
  assert inspection.main(["inspect", str(tmp_path / what)]) == 2
  captured = capsys.readouterr()
  assert words in captured.err and captured.err.count("\n") == 1 and "Traceback" not in captured.err


def test_usage(capsys):
  # Catches an argument that is silently ignored.
  for arguments, words in (
    ([], "DIR=None: is missing; the arguments are DIR"),
    (["a", "b"], "argument='b': is one too many"),
    (["--dir=a"], "flag='--dir=a': the flags are --debug"),
  ):
    assert inspection.main(["inspect", *arguments]) == 2
    assert words in capsys.readouterr().err
  assert inspection.main(["inspect", "--help"]) == 0 and "inspect DIR" in capsys.readouterr().out
