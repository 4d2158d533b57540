"""The guard decides which steps are bad, when a run goes back, and when it stops."""

import json
import math

import numpy as np
import pytest

from moe_jax.errors import Diverged
from moe_jax.training.guard import Guard, GuardOptions

pytestmark = pytest.mark.unit
NAN = math.nan


def judge(guard, losses, start=1, norms=None):
  """Returns the kinds of events of each step with these losses."""
  return [
    [
      event["event"]
      for event in guard.judge(n, loss, NAN if not math.isfinite(loss) else 1.0, "a/w", "kept")
    ]
    for n, loss in enumerate(losses, start)
  ]


def test_without_options_only_what_is_not_finite_matters():
  # Catches a guard that is on by default, and one that ignores a NaN.
  guard = Guard()
  assert not guard.watches
  assert judge(guard, [1.0, 100.0, 0.1]) == [[], [], []]
  with pytest.raises(
    Diverged,
    match="at step 4 the loss is nan .*first tensor .* is a/w; kept; go on from there with "
    "--config.train.guard.skip_nonfinite=True, or .* another --workdir with a lower",
  ):
    guard.judge(4, NAN, NAN, "a/w", "kept")
  with pytest.raises(Diverged, match="norm inf"):
    guard.judge(4, 1.0, math.inf, "a/w", "kept")


def test_a_spike_is_measured_in_robust_sigmas():
  # Catches a mean and a standard deviation, which one earlier spike would move, and a guard without
  # a least spread.
  def after(spread):
    """Returns a guard after twenty losses with the median 2 and this median deviation."""
    guard = Guard(GuardOptions(spike_sigmas=6.0))
    assert judge(guard, [2.0 + spread * (-1) ** n for n in range(20)]) == [[]] * 20
    return guard

  sigma = 0.1 * 1.4826
  assert judge(after(0.1), [2.0 + 5.9 * sigma]) == [[]]
  assert judge(after(0.001), [2.0 + 5.9 * 0.02]) == [[]]  # LEAST_SIGMA: 1% of 2.0
  assert judge(after(0.001), [2.0 + 6.1 * 0.02]) == [["spike"]]
  guard = after(0.1)
  assert judge(guard, [2.0 + 6.1 * sigma]) == [["spike"]] and guard.streak == 1
  assert judge(guard, [2.0]) == [[]] and guard.streak == 0
  # Ten losses are too few to call anything a spike.
  assert judge(Guard(GuardOptions(spike_sigmas=6.0)), [2.0] * 10 + [50.0]) == [[]] * 11


def test_patience_then_back_then_divergence():
  # Catches a run that goes back at once, never, or again and again, and counts that are lost when
  # it goes back.
  guard = Guard(GuardOptions(skip_nonfinite=True, patience=3, max_rollbacks=1))
  assert judge(guard, [1.0, NAN, NAN, 1.0, NAN, NAN]) == [
    [],
    ["nonfinite"],
    ["nonfinite"],
    [],
    ["nonfinite"],
    ["nonfinite"],
  ]
  assert judge(guard, [NAN], start=7) == [["nonfinite", "rollback"]]
  assert guard.healthy_before(7) == 5  # the steps 5, 6, 7 are bad
  guard.went_back(7, to=4)
  assert (guard.rollbacks, guard.skipped_batches, guard.streak) == (1, 3, 0)
  judge(guard, [NAN, NAN], start=5)
  with pytest.raises(Diverged, match="after 8 skipped updates, 1 rollback"):
    judge(guard, [NAN], start=7)


def test_without_skipping_one_bad_gradient_is_enough_to_go_back():
  # Catches steps with weights that are NaN.
  guard = Guard(GuardOptions(patience=5, max_rollbacks=2, rollback_margin=10))
  assert judge(guard, [NAN], start=30) == [["nonfinite", "rollback"]]
  assert guard.healthy_before(30) == 20


def test_a_new_level_is_accepted_where_nobody_goes_back():
  # Catches an alarm in every step for the rest of the run.
  guard = Guard(GuardOptions(spike_sigmas=5.0, patience=2))
  kinds = judge(guard, [1.0] * 20 + [3.0] * 40)
  assert kinds[20:22] == [["spike"], ["spike"]] and kinds[22:] == [[]] * 38


def test_what_it_knows_survives_a_checkpoint():
  # Catches decisions that differ in a run that was killed and resumed.
  guard = Guard(GuardOptions(skip_nonfinite=True, spike_sigmas=4.0, patience=9, starved_share=0.1))
  judge(guard, [1.0, 1.1] * 10 + [NAN, 9.0])
  guard.watch_load(np.array([[0.5, 0.5, 0.0]]), ["layer 1"])
  other = Guard(GuardOptions(skip_nonfinite=True, spike_sigmas=4.0, patience=9, starved_share=0.1))
  other.restore(json.loads(json.dumps(guard.state())))
  assert other == guard
  other.went_back(30, 20)
  other.restore(guard.state(), keep_counts=True)
  assert (other.rollbacks, other.skipped_batches, other.losses) == (1, 10, guard.losses)


def test_starved_experts_are_named_once_with_their_layer():
  # Catches an alarm after a single batch, an alarm at every log line, and the name of a wrong
  # layer.
  guard = Guard(GuardOptions(starved_share=0.2))
  balanced, collapsed = np.full((2, 4), 0.25), np.array([[0.25] * 4, [0.0, 0.96, 0.04, 0.0]])

  def watch(load):
    return guard.watch_load(load, ["layer 1", "layer 3"])

  assert [len(watch(load)) for load in (collapsed, collapsed, balanced, collapsed, collapsed)] == [
    0
  ] * 5
  (event,) = watch(collapsed)
  assert (event["layer"], event["experts"]) == ("layer 3", [0, 2, 3])
  assert (
    "3 experts of 4 (0, 2, 3)" in event["message"]
    and "expert 1 gets 96% of the assignments" in event["message"]
  )
  assert (
    watch(collapsed) == [] and Guard().watch_load(collapsed, ["a", "b"]) == [] and watch(None) == []
  )
