"""Router metrics, by hand."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dispatch import drop_overflow
from moe_jax.routing import RoutingContext, RoutingPlan, metrics, top_k

pytestmark = pytest.mark.unit

# Three tokens, the last is padding; experts 0, 1, 2; token 0 -> 0 and 1, token 1 -> 0.
PLAN = RoutingPlan(token=jnp.array([0, 1, 2, 0]), expert=jnp.array([0, 0, 3, 1]), gate=jnp.array([0.5, 0.9, 0.0, 0.5]),
                   num_experts=3)
VALID = jnp.array([True, True, False])


def test_load_and_violation():
  # Catches: the sentinel counted (as the last expert, or in the sum), load not normalised.
  load = metrics.load(PLAN)
  np.testing.assert_allclose(load, [2 / 3, 1 / 3, 0], rtol=1e-6)
  assert float(metrics.max_violation(load)) == pytest.approx(1.0)  # 2/3 * 3 - 1
  assert float(metrics.max_violation(jnp.full(4, 0.25))) == 0.0


def test_drops():
  # At capacity 1, expert 0 keeps token 0 and drops token 1, which had nothing else: 1 of 3 assignments, 1 of 2 tokens.
  # Catches: padding counted as dropped, a rate over all A.
  kept = drop_overflow(PLAN, 1)
  assert float(metrics.drop_rate(PLAN, kept)) == pytest.approx(1 / 3)
  assert float(metrics.dropped_tokens(kept, VALID)) == pytest.approx(1 / 2)
  assert float(metrics.drop_rate(PLAN, PLAN)) == 0.0 and float(metrics.dropped_tokens(PLAN, VALID)) == 0.0


def test_over_several_groups():
  # The same group twice, once with and once without drops. Catches: tokens of different groups confused.
  kept = drop_overflow(PLAN, 1)
  stack = lambda a, b: RoutingPlan(*(jnp.stack([getattr(a, n), getattr(b, n)]) for n in ("token", "expert", "gate")), 3)
  assert float(metrics.drop_rate(stack(PLAN, PLAN), stack(kept, PLAN))) == pytest.approx(1 / 6)
  assert float(metrics.dropped_tokens(stack(kept, PLAN), jnp.stack([VALID, VALID]))) == pytest.approx(1 / 4)
  np.testing.assert_allclose(metrics.load(stack(PLAN, PLAN)), metrics.load(PLAN))


def test_entropy_probability_logit():
  # Catches: entropy in bits, padding in a mean or a maximum, a maximum without sign.
  logits = jnp.array([[0.0, 0.0, 0.0, 0.0], [-9.0, 0.0, 0.0, 0.0], [50.0, 0.0, 0.0, 0.0]])
  one = jnp.array([True, False, False])
  assert float(metrics.entropy(logits, one)) == pytest.approx(math.log(4))
  assert float(metrics.logit_max(logits, jnp.array([True, True, False]))) == 9.0
  assert float(metrics.logit_max(logits, None)) == 50.0
  assert float(metrics.entropy(1e4 * logits, None)) == pytest.approx((math.log(4) + math.log(3)) / 3, rel=1e-5)


def test_nobody_is_zero_not_nan():
  # Catches: 0/0 in a batch of padding.
  logits, nobody = jnp.ones((3, 4)), jnp.zeros(3, bool)
  plan = top_k(logits, RoutingContext(valid=nobody), k=2)
  values = [metrics.load(plan), metrics.drop_rate(plan, plan), metrics.dropped_tokens(plan, nobody),
            metrics.entropy(logits, nobody), metrics.logit_max(logits, nobody)]
  assert not any(np.any(v) for v in values)
