"""Tests the metrics of routers by hand."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dispatch import drop_overflow
from moe_jax.routing import RoutingContext, RoutingPlan, metrics
from moe_jax.routing.top_k import top_k

pytestmark = pytest.mark.unit

# There are three tokens, the last of which is padding, and three experts. Token 0 visits experts 0
# and 1, and token 1 visits expert 0.
PLAN = RoutingPlan(
  token=jnp.array([0, 1, 2, 0]),
  expert=jnp.array([0, 0, 3, 1]),
  gate=jnp.array([0.5, 0.9, 0.0, 0.5]),
  num_experts=3,
)
VALID = jnp.array([True, True, False])


def stack(a, b):
  return RoutingPlan(
    *(jnp.stack([getattr(a, n), getattr(b, n)]) for n in ("token", "expert", "gate")), 3
  )


def test_load_and_violation():
  # Catches index E that is counted (as the last expert, or in the sum), and a load that is not
  # normalised.
  load = metrics.load(PLAN)
  np.testing.assert_allclose(load, [2 / 3, 1 / 3, 0], rtol=1e-6)
  assert float(metrics.max_violation(load)) == pytest.approx(1.0)  # 2/3 * 3 - 1
  assert float(metrics.max_violation(jnp.full(4, 0.25))) == 0.0


def test_spread_over_experts_and_devices():
  # Two layers of four experts; as multiples of an even load their loads are 0, 2, 2, 0 and 0.4,
  # 0.8, 1.2, 1.6. The median of all eight is between 0.8 and 1.2, the 5th and the 95th percentile
  # are between two equal values. Of two devices, the second has 0.7 of the second layer. Catches
  # percentiles of each layer alone, other percentiles, shares in place of multiples, and experts
  # that are dealt out like cards.
  load = np.array([[0.0, 0.5, 0.5, 0.0], [0.1, 0.2, 0.3, 0.4]])
  np.testing.assert_allclose(metrics.load_percentiles(load), [0, 1, 2])
  np.testing.assert_allclose(metrics.device_overload(load, 2), [1, 1.4])
  np.testing.assert_allclose(metrics.device_overload(load, 4), [2, 1.6])
  np.testing.assert_allclose(metrics.device_overload(np.array([0.5, 0.3, 0.1, 0.1]), 2), 1.6)


def test_importance():
  # Expert 0 gets gates of 0.5 + 0.9 and expert 1 gets 0.5, of a total of 1.9. Catches assignments
  # that are counted instead of gates, and a total below 1 that is not divided by.
  np.testing.assert_allclose(metrics.importance(PLAN), [1.4 / 1.9, 0.5 / 1.9, 0], rtol=1e-6)
  small = PLAN.replace(gate=0.1 * PLAN.gate)
  np.testing.assert_allclose(metrics.importance(small), metrics.importance(PLAN), rtol=1e-6)
  np.testing.assert_allclose(
    metrics.importance(stack(PLAN, PLAN)), metrics.importance(PLAN), rtol=1e-6
  )


def test_capacity_used():
  # Three experts with two slots each hold 2, 1 and 0 tokens, which fills 3 of 6 slots. With one
  # slot each, token 1 is dropped and 2 of 3 slots are filled. Catches index E that is counted as a
  # filled slot, a number of slots that ignores groups, and the plan before overflow is dropped.
  kept = drop_overflow(PLAN, 1)
  assert float(metrics.capacity_used(PLAN, 2)) == pytest.approx(3 / 6)
  assert float(metrics.capacity_used(kept, 1)) == pytest.approx(2 / 3)
  idle = PLAN.replace(expert=jnp.full(4, 3), gate=jnp.zeros(4))
  assert float(metrics.capacity_used(stack(PLAN, idle), 2)) == pytest.approx(3 / 12)


def test_gate_norm():
  # Token 0 has gates of 0.5 + 0.5 and token 1 has 0.9, which gives a mean of 0.95. A capacity of 1
  # drops token 1, which leaves 0.5. Catches padding among the tokens, and a mean over assignments.
  assert float(metrics.gate_norm(PLAN, VALID)) == pytest.approx(0.95)
  assert float(metrics.gate_norm(drop_overflow(PLAN, 1), VALID)) == pytest.approx(0.5)
  assert float(metrics.gate_norm(stack(PLAN, PLAN), jnp.stack([VALID, VALID]))) == pytest.approx(
    0.95
  )
  renormalised = top_k(
    jnp.arange(12.0).reshape(3, 4) ** 2, RoutingContext(valid=VALID), k=2, gate_norm="top_k"
  )
  assert float(metrics.gate_norm(renormalised, VALID)) == pytest.approx(1.0)


def test_gate_norm_of_a_single_token():
  # Catches a mean over at least two tokens.
  one = RoutingPlan(
    token=jnp.array([0]), expert=jnp.array([0]), gate=jnp.array([0.75]), num_experts=2
  )
  assert float(metrics.gate_norm(one, jnp.array([True]))) == pytest.approx(0.75)


def test_coactivation():
  # Expert 0 serves tokens 0 and 1, and expert 1 serves token 0. So half of expert 0's tokens visit
  # expert 1, and all of expert 1's tokens visit expert 0. Catches the transpose, a joint frequency
  # instead of a conditional one, and padding that is counted as a visit.
  np.testing.assert_allclose(metrics.coactivation(PLAN, 3), [[1, 0.5, 0], [1, 1, 0], [0, 0, 0]])


def test_coactivation_over_groups_and_layouts():
  # The second group has the order of expert choice and the same token indices: experts 0 and 1 take
  # token 1, and expert 2 takes tokens 0 and 1. Of expert 0's three tokens, two of which are in the
  # first group, two visit expert 1 and one visits expert 2. Catches token 1 of one group that is
  # mistaken for token 1 of another.
  other = RoutingPlan(
    token=jnp.array([1, 1, 0, 1]), expert=jnp.array([0, 1, 2, 2]), gate=jnp.ones(4), num_experts=3
  )
  expected = [[1, 2 / 3, 1 / 3], [1, 1, 1 / 2], [1 / 2, 1 / 2, 1]]
  np.testing.assert_allclose(metrics.coactivation(stack(PLAN, other), 3), expected, rtol=1e-6)


def test_churn():
  # PLAN has the pairs (0, 0), (1, 0) and (0, 1). `moved` has (0, 0), (1, 2) and (0, 1) in another
  # order, and also (1, 1). One of three pairs is missing, or two of four in the opposite direction.
  # Catches order or gates that matter, a division by the number of new pairs, token and expert
  # swapped, and an assignment to no expert that is counted as a pair.
  moved = RoutingPlan(
    token=jnp.array([0, 1, 0, 1]), expert=jnp.array([1, 2, 0, 1]), gate=jnp.ones(4), num_experts=3
  )
  away = RoutingPlan(
    token=jnp.array([0, 1]), expert=jnp.array([2, 2]), gate=jnp.ones(2), num_experts=3
  )
  assert float(metrics.churn(PLAN, moved, 3)) == pytest.approx(1 / 3)
  assert float(metrics.churn(moved, PLAN, 3)) == pytest.approx(2 / 4)
  assert float(metrics.churn(PLAN, PLAN, 3)) == 0.0 and float(metrics.churn(PLAN, away, 3)) == 1.0
  # If two groups change places, the first loses (1, 0) and the second loses (1, 1) and (1, 2),
  # which are 3 of 7 pairs. Catches groups that are confused.
  assert float(metrics.churn(stack(PLAN, moved), stack(moved, PLAN), 3)) == pytest.approx(3 / 7)


def test_drops():
  # With a capacity of 1, expert 0 keeps token 0 and drops token 1, which has no other expert. This
  # drops 1 of 3 assignments and 1 of 2 tokens. Catches padding that is counted as dropped, and a
  # rate over all A.
  kept = drop_overflow(PLAN, 1)
  assert float(metrics.drop_rate(PLAN, kept)) == pytest.approx(1 / 3)
  assert float(metrics.dropped_tokens(kept, VALID)) == pytest.approx(1 / 2)
  assert (
    float(metrics.drop_rate(PLAN, PLAN)) == 0.0
    and float(metrics.dropped_tokens(PLAN, VALID)) == 0.0
  )


def test_over_several_groups():
  # There are two copies of a group, one with and one without overflow. Catches tokens of different
  # groups that are confused.
  kept = drop_overflow(PLAN, 1)
  assert float(metrics.drop_rate(stack(PLAN, PLAN), stack(kept, PLAN))) == pytest.approx(1 / 6)
  assert float(
    metrics.dropped_tokens(stack(kept, PLAN), jnp.stack([VALID, VALID]))
  ) == pytest.approx(1 / 4)
  np.testing.assert_allclose(metrics.load(stack(PLAN, PLAN)), metrics.load(PLAN))


def test_entropy_probability_logit():
  # Catches an entropy in bits, padding in a mean or a maximum, and a maximum that ignores negative
  # logits.
  logits = jnp.array([[0.0, 0.0, 0.0, 0.0], [-9.0, 0.0, 0.0, 0.0], [50.0, 0.0, 0.0, 0.0]])
  one = jnp.array([True, False, False])
  assert float(metrics.entropy(logits, one)) == pytest.approx(math.log(4))
  assert float(metrics.logit_max(logits, jnp.array([True, True, False]))) == 9.0
  assert float(metrics.logit_max(logits, None)) == 50.0
  assert float(metrics.entropy(1e4 * logits, None)) == pytest.approx(
    (math.log(4) + math.log(3)) / 3, rel=1e-5
  )


def test_nobody_is_zero_not_nan():
  # Catches 0/0 in a batch of padding.
  logits, nobody = jnp.ones((3, 4)), jnp.zeros(3, bool)
  plan = top_k(logits, RoutingContext(valid=nobody), k=2)
  values = [
    metrics.load(plan),
    metrics.drop_rate(plan, plan),
    metrics.dropped_tokens(plan, nobody),
    metrics.entropy(logits, nobody),
    metrics.logit_max(logits, nobody),
    metrics.importance(plan),
    metrics.capacity_used(plan, 2),
    metrics.gate_norm(plan, nobody),
    metrics.coactivation(plan, 3),
    metrics.churn(plan, plan, 3),
  ]
  assert not any(np.any(v) for v in values)


def test_sums_of_parts_make_the_metrics_of_the_whole():
  # The parts differ in padding and load: one is PLAN, of which a capacity of 1 drops a token, and
  # the other has one real token, which visits expert 2. Catches metrics that are averaged over
  # parts, a maximum that is added up, a count that is rounded, and a metric of the wrong sums.
  other = RoutingPlan(
    token=jnp.array([0, 1, 2, 2]),
    expert=jnp.array([3, 3, 2, 3]),
    gate=jnp.array([0, 0, 1.0, 0]),
    num_experts=3,
  )
  logits = jnp.array(
    [[[3.0, 1.0, 0.0], [9.0, 0.0, 0.0], [0.0, 0.0, 7.0]], [[0.0] * 3, [0.0] * 3, [0.0, 0.0, -5.0]]]
  )
  valid = jnp.array([VALID, [False, False, True]])
  parts = [
    metrics.sums(logits[i], plan, drop_overflow(plan, 1), valid[i])
    for i, plan in enumerate((PLAN, other))
  ]
  combined = metrics.combine({name: jnp.stack([part[name] for part in parts]) for name in parts[0]})
  found = metrics.finish(combined)
  plan, kept = stack(PLAN, other), stack(drop_overflow(PLAN, 1), drop_overflow(other, 1))
  load = metrics.load(plan)
  expected = {
    "load": load,
    "experts_a_token": jnp.sum(plan.expert < 3) / jnp.sum(valid),
    "drop_rate": metrics.drop_rate(plan, kept),
    "max_violation": metrics.max_violation(load),
    "dropped_tokens": metrics.dropped_tokens(kept, valid),
    "entropy": metrics.entropy(logits, valid),
    "logit_max": metrics.logit_max(logits, valid),
  }
  assert found.keys() == expected.keys() and combined["assigned"].dtype == jnp.int32
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)
  np.testing.assert_allclose(found["load"], [2 / 4, 1 / 4, 1 / 4])
  # Sums of several layers have a leading axis. Catches a maximum over layers.
  layers = metrics.finish({name: jnp.stack([part[name] for part in parts]) for name in parts[0]})
  np.testing.assert_allclose(layers["max_violation"], [1.0, 2.0], rtol=1e-6)
  assert metrics.finish({}) == {}
