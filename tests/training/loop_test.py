"""The order of events in the loop, with everything around it acted: log, evaluate, save, stop, refuse NaN."""

import pathlib
import types

import jax.numpy as jnp
import pytest
import tiny

from moe_jax import sharding
from moe_jax.training import evaluate, loop

pytestmark = pytest.mark.unit


class Recorder:
  """Stands for checkpoints, writer, progress and interrupt, and remembers what they were told."""

  def __init__(self, stop_at=None):
    self.events, self.name, self.stop_at, self.directory = [], "", stop_at, pathlib.Path("checkpoints")

  def save(self, n, state, data, meta, bits):
    self.events.append(("save", n, data["batches"], bits))

  def write(self, n, kind, values):
    self.events.append((kind, n))

  def log(self, loss):
    return 1.0

  def latest_step(self):
    return max((e[1] for e in self.events if e[0] == "save"), default=None)

  def step(self, n, loss):
    self.events.append(("shown", n))

  say = pause = wait = lambda *_: None


class Batches:
  def __init__(self, recorder, begun=0):
    self.count, self.recorder = begun, recorder

  def __next__(self):
    self.count += 1
    if self.count == self.recorder.stop_at:
      self.recorder.name = "SIGTERM"
    return {}

  def get_state(self):
    return {"batches": self.count}


def run(tmp_path, recorder, losses=lambda n: 1.0, begun=0, **changes):
  config = tiny.config(tmp_path, train__steps=7, train__log_every=2, train__eval_every=3, train__checkpoint_every=3,
                       **changes)
  def update(state, batch):
    n = int(state.step) + 1
    return types.SimpleNamespace(step=jnp.int32(n)), {"loss": jnp.float32(losses(n)), "grad_norm": jnp.float32(1)}
  totals = {"a": {"nats": 1.0, "tokens": 1, "bytes": 1}}
  state, stopped = loop._steps(config, types.SimpleNamespace(step=jnp.int32(begun)), Batches(recorder, begun), update,
                               sharding.make_mesh({"data": 1}), lambda state, n: totals, recorder, recorder, recorder,
                               recorder, 0.0)
  return int(state.step), stopped, [e for e in recorder.events if e[0] != "shown"]


def test_logs_evaluates_and_saves_when_due(tmp_path):
  # Catches: a last step that is not saved; a checkpoint whose data state is a batch ahead; a save before
  # its evaluation.
  bits = evaluate.summary({"a": {"nats": 1.0, "tokens": 1, "bytes": 1}})["bits_per_byte"]
  step, stopped, events = run(tmp_path, Recorder())
  assert (step, stopped) == (7, False)
  assert events == [("train", 2), ("eval", 3), ("save", 3, 3, bits), ("train", 4), ("train", 6), ("eval", 6),
                    ("save", 6, 6, bits), ("train", 7), ("eval", 7), ("save", 7, 7, bits)]


def test_a_resumed_run_goes_on_with_the_same_events(tmp_path):
  # Catches: intervals counted from the start of the process.
  assert run(tmp_path, Recorder(), begun=3)[2] == run(tmp_path, Recorder())[2][3:]


def test_a_signal_finishes_the_step_and_saves(tmp_path):
  # Catches: a step lost, a step too many, no save.
  step, stopped, events = run(tmp_path, Recorder(stop_at=5))
  assert (step, stopped, events[-1]) == (5, True, ("save", 5, 5, None))


@pytest.mark.parametrize("at", [3, 5])
def test_nan_stops_before_it_is_saved(tmp_path, at):
  # Catches: a diverged model that replaces the last good checkpoint: at step 3 the save is due in the same step.
  recorder = Recorder()
  with pytest.raises(loop.Diverged, match=f"step {at} the loss is nan") as error:
    run(tmp_path, recorder, lambda n: float("nan") if n >= at else 1.0)
  saved = [e[1] for e in recorder.events if e[0] == "save"]
  assert saved == [3][:at - 3] and ("checkpoints" in str(error.value) or at == 3)
  assert "optimizer.learning_rate" in str(error.value)


def test_every_steps_loss_is_looked_at_once(tmp_path):
  # Catches: a NaN between two logs that goes unnoticed or is told of a later step.
  recorder = Recorder()
  run(tmp_path, recorder)
  assert [e[1] for e in recorder.events if e[0] == "shown"] == [1, 2, 3, 4, 5, 6, 7]
