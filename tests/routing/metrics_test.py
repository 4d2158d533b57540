"""Router metrics, by hand."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dispatch import drop_overflow
from moe_jax.routing import RoutingContext, RoutingPlan, metrics
from moe_jax.routing.top_k import top_k

pytestmark = pytest.mark.unit

# Three tokens, the last is padding; experts 0, 1, 2; token 0 -> 0 and 1, token 1 -> 0.
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
  # Catches: the sentinel counted (as the last expert, or in the sum), load not normalised.
  load = metrics.load(PLAN)
  np.testing.assert_allclose(load, [2 / 3, 1 / 3, 0], rtol=1e-6)
  assert float(metrics.max_violation(load)) == pytest.approx(1.0)  # 2/3 * 3 - 1
  assert float(metrics.max_violation(jnp.full(4, 0.25))) == 0.0


def test_importance():
  # Expert 0 gets gates .5 + .9, expert 1 gets .5, of 1.9 in all. Catches: assignments counted
  # instead of gates, a total below 1 not divided out.
  np.testing.assert_allclose(metrics.importance(PLAN), [1.4 / 1.9, 0.5 / 1.9, 0], rtol=1e-6)
  small = PLAN.replace(gate=0.1 * PLAN.gate)
  np.testing.assert_allclose(metrics.importance(small), metrics.importance(PLAN), rtol=1e-6)
  np.testing.assert_allclose(
    metrics.importance(stack(PLAN, PLAN)), metrics.importance(PLAN), rtol=1e-6
  )


def test_capacity_used():
  # Three experts of two slots hold 2, 1 and 0 tokens: 3 of 6. At one slot each, token 1 is dropped:
  # 2 of 3. Catches: the sentinel counted as a filled slot, groups not counted among the slots, the
  # plan before its drops.
  kept = drop_overflow(PLAN, 1)
  assert float(metrics.capacity_used(PLAN, 2)) == pytest.approx(3 / 6)
  assert float(metrics.capacity_used(kept, 1)) == pytest.approx(2 / 3)
  idle = PLAN.replace(expert=jnp.full(4, 3), gate=jnp.zeros(4))
  assert float(metrics.capacity_used(stack(PLAN, idle), 2)) == pytest.approx(3 / 12)


def test_gate_norm():
  # Token 0 has gates .5 + .5, token 1 has .9: a mean of .95; without token 1, which capacity 1
  # drops: .5. Catches: padding among the tokens, a mean over assignments.
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
  # Catches: a mean over at least two tokens.
  one = RoutingPlan(
    token=jnp.array([0]), expert=jnp.array([0]), gate=jnp.array([0.75]), num_experts=2
  )
  assert float(metrics.gate_norm(one, jnp.array([True]))) == pytest.approx(0.75)


def test_coactivation():
  # Expert 0 serves tokens 0 and 1, expert 1 token 0: of expert 0's tokens half visit 1, of expert
  # 1's all visit 0. Catches: the transpose, a joint frequency for a conditional one, padding as a
  # token that visits an expert.
  np.testing.assert_allclose(metrics.coactivation(PLAN, 3), [[1, 0.5, 0], [1, 1, 0], [0, 0, 0]])


def test_coactivation_over_groups_and_layouts():
  # The second group, in an expert-choice layout with equal token numbers: expert 0 takes 1, expert
  # 1 takes 1, expert 2 takes 0 and 1. Of expert 0's three tokens (two of the first group) two visit
  # 1 and one visits 2. Catches: token 1 of one group taken for token 1 of another.
  other = RoutingPlan(
    token=jnp.array([1, 1, 0, 1]), expert=jnp.array([0, 1, 2, 2]), gate=jnp.ones(4), num_experts=3
  )
  expected = [[1, 2 / 3, 1 / 3], [1, 1, 1 / 2], [1 / 2, 1 / 2, 1]]
  np.testing.assert_allclose(metrics.coactivation(stack(PLAN, other), 3), expected, rtol=1e-6)


def test_churn():
  # PLAN has the pairs (0, 0), (1, 0), (0, 1); `moved` has (0, 0), (1, 2), (0, 1) in another order
  # and a fourth, (1, 1). One of three is gone; the other way, two of four. Catches: order or gates
  # that count, division by the new pairs, token and expert exchanged, padding that stays with
  # nobody counted as a pair.
  moved = RoutingPlan(
    token=jnp.array([0, 1, 0, 1]), expert=jnp.array([1, 2, 0, 1]), gate=jnp.ones(4), num_experts=3
  )
  away = RoutingPlan(
    token=jnp.array([0, 1]), expert=jnp.array([2, 2]), gate=jnp.ones(2), num_experts=3
  )
  assert float(metrics.churn(PLAN, moved, 3)) == pytest.approx(1 / 3)
  assert float(metrics.churn(moved, PLAN, 3)) == pytest.approx(2 / 4)
  assert float(metrics.churn(PLAN, PLAN, 3)) == 0.0 and float(metrics.churn(PLAN, away, 3)) == 1.0
  # Two groups that change places lose (1, 0) here and (1, 1), (1, 2) there: 3 of 7. Catches: groups
  # confused.
  assert float(metrics.churn(stack(PLAN, moved), stack(moved, PLAN), 3)) == pytest.approx(3 / 7)


def test_drops():
  # At capacity 1, expert 0 keeps token 0 and drops token 1, which had nothing else: 1 of 3
  # assignments, 1 of 2 tokens. Catches: padding counted as dropped, a rate over all A.
  kept = drop_overflow(PLAN, 1)
  assert float(metrics.drop_rate(PLAN, kept)) == pytest.approx(1 / 3)
  assert float(metrics.dropped_tokens(kept, VALID)) == pytest.approx(1 / 2)
  assert (
    float(metrics.drop_rate(PLAN, PLAN)) == 0.0
    and float(metrics.dropped_tokens(PLAN, VALID)) == 0.0
  )


def test_over_several_groups():
  # The same group twice, once with and once without drops. Catches: tokens of different groups
  # confused.
  kept = drop_overflow(PLAN, 1)
  assert float(metrics.drop_rate(stack(PLAN, PLAN), stack(kept, PLAN))) == pytest.approx(1 / 6)
  assert float(
    metrics.dropped_tokens(stack(kept, PLAN), jnp.stack([VALID, VALID]))
  ) == pytest.approx(1 / 4)
  np.testing.assert_allclose(metrics.load(stack(PLAN, PLAN)), metrics.load(PLAN))


def test_entropy_probability_logit():
  # Catches: entropy in bits, padding in a mean or a maximum, a maximum without sign.
  logits = jnp.array([[0.0, 0.0, 0.0, 0.0], [-9.0, 0.0, 0.0, 0.0], [50.0, 0.0, 0.0, 0.0]])
  one = jnp.array([True, False, False])
  assert float(metrics.entropy(logits, one)) == pytest.approx(math.log(4))
  assert float(metrics.logit_max(logits, jnp.array([True, True, False]))) == 9.0
  assert float(metrics.logit_max(logits, None)) == 50.0
  assert float(metrics.entropy(1e4 * logits, None)) == pytest.approx(
    (math.log(4) + math.log(3)) / 3, rel=1e-5
  )


def test_nobody_is_zero_not_nan():
  # Catches: 0/0 in a batch of padding.
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
  # Parts of unlike padding and load: PLAN, of which capacity 1 drops a token, and one real token
  # for expert 2. Catches: metrics averaged over parts, a maximum that is added up, a count that
  # rounds, a metric of other sums.
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
  # Of layers, with a leading axis. Catches: a maximum over layers.
  layers = metrics.finish({name: jnp.stack([part[name] for part in parts]) for name in parts[0]})
  np.testing.assert_allclose(layers["max_violation"], [1.0, 2.0], rtol=1e-6)
  assert metrics.finish({}) == {}
