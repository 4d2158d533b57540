"""The training loop logs, evaluates, saves and stops in the right order.

Everything around the loop is replaced by objects that record its calls.
"""

import json
import math
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moe_jax import sharding
from moe_jax.data.dynamic import DynamicOptions
from moe_jax.errors import ConfigError, Diverged
from moe_jax.run import loop
from moe_jax.training import evaluate
from moe_jax.training.checkpoints import Restored
from moe_jax.training.guard import Guard, GuardOptions
from moe_jax.training.options import TrainOptions
from moe_jax.training.state import TrainState

pytestmark = pytest.mark.unit


class Recorder:
  """Takes the place of checkpoints, writer, progress and interrupt, and records all calls."""

  def __init__(self, stop_at=None):
    self.events, self.name, self.stop_at, self.directory = (
      [],
      "",
      stop_at,
      pathlib.Path("checkpoints"),
    )
    self.saved, self.trouble, self.said = {}, "", []

  def save(self, n, state, data, meta, bits):
    self.events.append(("save", n, data["batches"], bits))
    self.saved[n] = state, data, {"guard": json.loads(json.dumps(meta["guard"]))}

  def restore(self, abstract, before):
    step = max(n for n in self.saved if n < before)
    self.events.append(("restore", step))
    return Restored(step, *self.saved[step], [])

  def drop_after(self, step):
    self.saved = {n: saved for n, saved in self.saved.items() if n <= step}

  def write(self, n, kind, values):
    self.events.append((kind, n))

  def event(self, n, event):
    self.events.append((event["event"], n, event["batch"]))

  def log(self, loss):
    return 1.0

  def kept(self):
    return (
      f"checkpoint checkpoints/{max(self.saved)} is from before"
      if self.saved
      else "there is no checkpoint yet"
    )

  def steps(self):
    return sorted(self.saved)

  def step(self, n, loss):
    self.events.append(("shown", n))

  def say(self, text):
    self.said.append(text)

  pause = wait = forget_after = went_back = lambda *_: None


class Batches:
  def __init__(self, recorder, begun=0):
    self.count, self.recorder = begun, recorder

  def __next__(self):
    self.count += 1
    if self.count == self.recorder.stop_at:
      self.recorder.name = "SIGTERM"
    return {"number": np.full(1, self.count)}

  def get_state(self):
    return {"batches": self.count}


class Mixture(Batches):
  """Batches of two sources, whose shares are a part of their state."""

  shares = (0.5, 0.5)

  def get_state(self):
    return super().get_state() | {"shares": self.shares}

  def change_shares(self, shares):
    self.shares = tuple(shares)
    self.recorder.events.append(("shares", self.count, *(round(share, 6) for share in shares)))

  def take_shares(self, state):
    self.change_shares(state.get("shares", (0.5, 0.5)))


def fresh(n=0):
  return TrainState(
    step=jnp.int32(n), params={}, opt_state=(), router_state={}, rng=jax.random.key(0)
  )


def run(
  tmp_path,
  recorder,
  losses=lambda n: 1.0,
  begun=0,
  guard=None,
  deadline=math.inf,
  batches=None,
  dynamic=None,
  totals=None,
  **changes,
):
  """Trains seven steps, and returns (step, what stopped the run, events).

  `losses` maps the number of a batch to its loss. `dynamic` are the options of the shares of the
  sources, and `totals` the result of each evaluation.
  """
  config = tiny.config(
    tmp_path,
    **{
      "train__steps": 7,
      "train__log_every": 2,
      "train__eval_every": 3,
      "train__checkpoint_every": 3,
    }
    | changes,
  )

  def update(state, batch):
    loss = jnp.float32(losses(int(batch["number"][0])))
    return fresh(int(state.step) + 1), {
      "loss": loss,
      "grad_norm": loss,
      "grad_norms": jnp.stack([jnp.float32(1), loss]),
    }

  totals = totals or {"a": {"nats": 1.0, "tokens": 1, "bytes": 1}}
  one = loop.Run(
    TrainOptions.of(config.train),
    "next_token",
    sharding.make_mesh({"data": 1}),
    update,
    fresh,
    None,
    lambda state, n: totals,
    batches or Batches(recorder, begun),
    recorder,
    recorder,
    recorder,
    recorder,
    guard or Guard(),
    ["a", "b/w"],
    [],
    0,
    deadline=deadline,
    dynamic=dynamic or DynamicOptions(),
  )
  state, stopped = loop._steps(one, fresh(begun))
  return int(state.step), stopped, [e for e in recorder.events if e[0] != "shown"]


def test_logs_evaluates_and_saves_when_due(tmp_path):
  # Catches a last step that is not saved, a checkpoint whose position in the data is a batch ahead,
  # and a save before the evaluation of the same step.
  bits = evaluate.summary({"a": {"nats": 1.0, "tokens": 1, "bytes": 1}})["bits_per_byte"]
  step, stopped, events = run(tmp_path, Recorder())
  assert (step, stopped) == (7, "")
  assert events == [
    ("train", 2),
    ("eval", 3),
    ("save", 3, 3, bits),
    ("train", 4),
    ("train", 6),
    ("eval", 6),
    ("save", 6, 6, bits),
    ("train", 7),
    ("eval", 7),
    ("save", 7, 7, bits),
  ]


def test_the_use_of_the_experts_in_words():
  # Catches a mean over layers that hides the one that drops, and a load that is no multiple.
  metrics = {
    "moe/load": np.array([[0.5, 0.5], [0.9, 0.1]]),
    "moe/drop_rate": np.array([0.0, 0.25]),
    "moe/logit_max": np.array([3.0, 12.25]),
  }
  assert loop.routing_words(metrics) == "dropped 25.0%, max load 1.8x, max logit 12.2"
  metrics["moe/drop_rate"] = np.zeros(2)
  assert loop.routing_words(metrics).startswith("max load")
  assert loop.routing_words({"loss": 1.0}) == ""


def test_the_spread_of_the_loads():
  # Catches the overload of devices on a mesh that does not divide the experts.
  load = np.array([[0.5, 0.3, 0.1, 0.1]])
  assert loop._spread(None, 4, 4) == {}
  assert list(loop._spread(load, 1, 4)) == ["moe/load_percentiles"]
  assert list(loop._spread(load, 3, 4)) == ["moe/load_percentiles"]
  np.testing.assert_allclose(loop._spread(load, 2, 4)["moe/device_overload"], [1.6])


def test_experts_without_an_ffn_load_no_device():
  # Two experts with an FFN get 0.3 and 0.1 of all assignments, so that the device of the first has
  # 1.5 times its part of their work. Catches the load of zero-computation experts on a device.
  load = np.array([[0.3, 0.1, 0.4, 0.2]])
  np.testing.assert_allclose(loop._spread(load, 2, 2)["moe/device_overload"], [1.5])


def test_a_resumed_run_goes_on_with_the_same_events(tmp_path):
  # Catches intervals that are counted from the start of the process.
  assert run(tmp_path, Recorder(), begun=3)[2] == run(tmp_path, Recorder())[2][3:]


def test_a_signal_finishes_the_step_and_saves(tmp_path):
  # Catches a lost step, an additional step, and a missing save.
  step, stopped, events = run(tmp_path, Recorder(stop_at=5))
  assert (step, stopped, events[-1]) == (5, "SIGTERM", ("save", 5, 5, None))


@pytest.mark.parametrize("at", [3, 5])
def test_nan_stops_before_it_is_saved(tmp_path, at):
  # Catches a diverged model that replaces the last good checkpoint. At step 3 a save is due in the
  # same step.
  recorder = Recorder()
  with pytest.raises(Diverged, match=f"step {at} the loss is nan .* finite is b/w") as error:
    run(tmp_path, recorder, lambda n: float("nan") if n >= at else 1.0)
  saved = [e[1] for e in recorder.events if e[0] == "save"]
  assert saved == [3][: at - 3] and ("checkpoints" in str(error.value) or at == 3)
  assert "optimizer.learning_rate" in str(error.value)


def test_every_steps_loss_is_looked_at_once(tmp_path):
  # Catches a NaN between two log lines that is not noticed, or is reported for a later step.
  recorder = Recorder()
  run(tmp_path, recorder)
  assert [e[1] for e in recorder.events if e[0] == "shown"] == [1, 2, 3, 4, 5, 6, 7]


NAN = math.nan


def test_a_rollback_goes_on_from_a_healthy_checkpoint_with_new_batches(tmp_path):
  # Catches bad batches that are trained on again, a checkpoint that is saved in the middle of a row
  # of bad steps, and lost counts.
  recorder, guard = (
    Recorder(),
    Guard(GuardOptions(skip_nonfinite=True, patience=2, max_rollbacks=1)),
  )
  step, stopped, events = run(
    tmp_path, recorder, lambda n: NAN if n in (6, 7) else 1.0, guard=guard, train__steps=9
  )
  told = [e for e in events if e[0] in ("save", "nonfinite", "rollback", "restore")]
  bits = told[0][3]
  # Step 6 is due to be saved, but it is bad. After step 7 the run goes back to step 3, after which
  # it reads batch 8.
  assert told == [
    ("save", 3, 3, bits),
    ("nonfinite", 6, 6),
    ("nonfinite", 7, 7),
    ("restore", 3),
    ("rollback", 3, 7),
    ("save", 6, 10, bits),
    ("save", 9, 13, bits),
  ]
  assert (step, stopped, guard.skipped_batches, guard.rollbacks) == (9, "", 4, 1)
  assert recorder.saved[9][2]["guard"]["skipped_batches"] == 4
  assert any("went back to step 3, and 4 batches are skipped" in text for text in recorder.said)


def sources(loss):
  """Returns an evaluation of source b with loss 1, and of source a with this one."""
  return {
    name: {"nats": nats, "tokens": 1.0, "bytes": 1.0} for name, nats in (("a", loss), ("b", 1.0))
  }


DYNAMIC = DynamicOptions(every=3, references=(1.0, 1.0))


def test_shares_change_after_evaluations_and_are_saved(tmp_path):
  # The loss of source a is ln 2 above its reference, so that each change doubles its share before
  # it is normalised: 1/2, 2/3, 4/5. Catches a change in a step without evaluation, one that the
  # checkpoint of the same step lacks, and one that no line of metrics and no line on the screen
  # tells.
  recorder = Recorder()
  run(
    tmp_path,
    recorder,
    batches=Mixture(recorder),
    dynamic=DYNAMIC,
    totals=sources(1 + math.log(2)),
    train__eval_every=1,
  )
  told = [e for e in recorder.events if e[0] in ("shares", "mixture", "save")]
  assert [e[:4] if e[0] == "shares" else e[:2] for e in told] == [
    ("shares", 3, 0.666667, 0.333333),
    ("mixture", 3),
    ("save", 3),
    ("shares", 6, 0.8, 0.2),
    ("mixture", 6),
    ("save", 6),
    ("save", 7),
  ]
  assert recorder.saved[3][1]["shares"] == pytest.approx((2 / 3, 1 / 3))
  assert any("step 6/7" in s and "a 0.667 -> 0.800  b 0.333 -> 0.200" in s for s in recorder.said)


def test_a_loss_that_is_not_finite_changes_no_share(tmp_path):
  # Catches shares that become NaN for ever, or a run that ends with a traceback.
  recorder = Recorder()
  run(tmp_path, recorder, batches=Mixture(recorder), dynamic=DYNAMIC, totals=sources(math.nan))
  kept = [e for e in recorder.events if e[0] in ("shares", "shares_kept")]
  assert kept == [("shares_kept", 3, 3), ("shares_kept", 6, 6)]
  assert any("the validation loss of a is nan" in text for text in recorder.said)


def test_a_rollback_takes_the_shares_of_its_checkpoint(tmp_path):
  # Catches shares that follow the losses of a model that the run has given up. The change after
  # step 6 comes in a row of bad steps, of which nothing is saved.
  recorder, guard = (
    Recorder(),
    Guard(GuardOptions(skip_nonfinite=True, patience=2, max_rollbacks=1)),
  )
  run(
    tmp_path,
    recorder,
    lambda n: NAN if n in (6, 7) else 1.0,
    guard=guard,
    batches=Mixture(recorder),
    dynamic=DYNAMIC,
    totals=sources(1 + math.log(2)),
  )
  assert [e[1:3] for e in recorder.events if e[0] == "shares"] == [
    (3, 0.666667),
    (6, 0.8),
    (7, 0.666667),
    (10, 0.8),
  ]


def test_a_rollback_before_the_first_checkpoint_begins_anew(tmp_path):
  # Catches a max() of an empty list.
  guard = Guard(GuardOptions(max_rollbacks=1))
  step, _, events = run(tmp_path, Recorder(), lambda n: NAN if n == 2 else 1.0, guard=guard)
  assert ("rollback", 0, 2) in events and (step, guard.skipped_batches) == (7, 2)


def test_a_signal_in_a_row_of_bad_steps_saves_nothing(tmp_path):
  # Catches a healthy checkpoint that is replaced by one in a row of bad steps.
  recorder, guard = Recorder(stop_at=5), Guard(GuardOptions(skip_nonfinite=True, patience=9))
  step, stopped, events = run(tmp_path, recorder, lambda n: NAN if n >= 4 else 1.0, guard=guard)
  assert (step, stopped, sorted(recorder.saved)) == (5, "SIGTERM", [3])


def test_the_clock_stops_a_start_that_has_had_its_minutes(tmp_path):
  # Catches a job that its queue kills before it has saved.
  step, stopped, events = run(tmp_path, Recorder(), deadline=0.0, train__max_minutes=1.5)
  assert (step, stopped, events[-1]) == (1, "train.max_minutes=1.5", ("save", 1, 1, None))


def test_a_batch_of_a_checkpoint_must_fit_its_step(tmp_path):
  # Catches a run that continues from another position in its data.
  config = tiny.config(tmp_path)
  meta = {"seconds": 1.0, "guard": Guard(skipped_batches=2).state()}
  place = types.SimpleNamespace(set_state=lambda data: None)
  for batches, good in ((6, False), (8, True)):
    restored = Restored(6, fresh(6), {"pipeline": "windows", "batches": batches}, meta, [])
    known = types.SimpleNamespace(
      directory=pathlib.Path("c"),
      resumed_step=lambda n: 6,
      restore=lambda _, restored=restored: restored,
    )
    if good:
      assert loop._begin(config, None, None, known, place, Guard())[1] == 1.0
    else:
      with pytest.raises(
        ConfigError, match="place in the data is batch 6, but 6 steps and 2 batches"
      ):
        loop._begin(config, None, None, known, place, Guard())


@pytest.mark.parametrize("noisy, different", [(False, []), (True, ["metrics/loss"])])
def test_a_step_that_draws_other_numbers_each_time_is_not_deterministic(
  tmp_path, monkeypatch, noisy, different
):
  # Catches a check that compares a state with itself, or that ignores the metrics.
  calls = []

  def make(config, model, optimizer, schedule, teacher):
    def update(state, batch):
      calls.append(1)
      return state, {"loss": jnp.float32(len(calls) if noisy else 1)}

    return update

  monkeypatch.setattr(loop.updates, "make", make)
  assert loop.determinism(tiny.config(tmp_path)) == different
