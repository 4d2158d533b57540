"""Tests expert choice by hand and against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from oracles.compare import check_appended_padding, check_oracle, draw

from moe_jax.dispatch import expert_capacity
from moe_jax.errors import ConfigError
from moe_jax.routing import RoutingContext
from moe_jax.routing.expert_choice import expert_choice

pytestmark = pytest.mark.unit

PROBS = np.array([[0.5, 0.3, 0.2], [0.3, 0.1, 0.6], [0.8, 0.15, 0.05], [0.1, 0.7, 0.2]])
LOGITS = jnp.log(jnp.asarray(PROBS, jnp.float32))


def test_by_hand():
  # C = round(1.5 * 4 / 3) = 2. Expert 0 prefers tokens 2 (0.8) and 0 (0.5), expert 1 prefers tokens
  # 3 (0.7) and 0 (0.3), and expert 2 prefers token 1 (0.6), before tokens 0 and 3 with a tie at
  # 0.2. Catches a softmax over tokens, a top-C over experts, and renormalised gates.
  plan = expert_choice(LOGITS, RoutingContext(), capacity_factor=1.5)
  triples = [(t, e, round(g, 4)) for t, e, g in reference.assignments(plan)]
  assert triples[:5] == [(2, 0, 0.8), (0, 0, 0.5), (3, 1, 0.7), (0, 1, 0.3), (1, 2, 0.6)]
  assert triples[5][1:] == (2, 0.2)


def test_ties_go_to_the_earlier_token():
  # Catches an unstable sort.
  plan = expert_choice(jnp.zeros((4, 2)), RoutingContext(), capacity_factor=1.0)
  assert [a[:2] for a in reference.assignments(plan)] == [(0, 0), (1, 0), (0, 1), (1, 1)]


@pytest.mark.parametrize(("factor", "slots"), [(0.01, 1), (1.0, 1), (2.0, 3), (3.0, 4), (100.0, 4)])
def test_capacity_is_rounded_and_clipped(factor, slots):
  # There are 4 tokens and 3 experts, so that a factor of 1 gives 1.33, which is rounded to 1.
  # Catches top_k with C > S, C = 0, and a capacity that differs from that of the layer.
  plan = expert_choice(LOGITS, RoutingContext(), capacity_factor=factor)
  assert plan.token.shape == (3 * slots,)
  assert expert_capacity(4, 3, plan.token.size, factor, "tokens", 1) == slots


def test_padding_is_never_chosen():
  # Two real tokens have 2 slots per expert, and then one real token has 2. Catches padding that is
  # chosen because of a high score, and an assignment to no expert with a nonzero gate.
  for valid in ([True, False, True, False], [False, False, False, True]):
    plan = expert_choice(LOGITS, RoutingContext(valid=jnp.array(valid)), capacity_factor=1.5)
    expected = reference.expert_choice(LOGITS, 1.5, valid)
    assert [a[:2] for a in reference.assignments(plan)] == [a[:2] for a in expected]
    assert not np.any(np.asarray(plan.gate)[np.asarray(plan.expert) == 3])


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_equals_the_oracle(factor):
  logits = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
  actual = reference.assignments(
    expert_choice(jnp.asarray(logits), RoutingContext(), capacity_factor=factor)
  )
  expected = reference.expert_choice(logits, factor)
  assert [a[:2] for a in actual] == [a[:2] for a in expected]
  np.testing.assert_allclose([a[2] for a in actual], [a[2] for a in expected], rtol=1e-5)


def test_router_learns():
  # Catches a stop_gradient on the gates.
  gradient = jax.grad(lambda l: jnp.sum(jnp.square(expert_choice(l, RoutingContext()).gate)))(
    LOGITS
  )
  assert np.abs(gradient).max() > 0.01


def test_bad_factor_is_named():
  with pytest.raises(ConfigError, match="capacity_factor"):
    expert_choice(LOGITS, RoutingContext(), capacity_factor=0.0)


def _oracle(logits, context, *, capacity_factor):
  return reference.expert_choice(logits, capacity_factor, np.asarray(context.valid))


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0, 5.0])
def test_equals_the_oracle_on_50_draws(factor):
  # Half of the groups have tied experts and tied tokens. Catches faults that a single draw hides.
  check_oracle(expert_choice, _oracle, *draw(1), capacity_factor=factor)


@pytest.mark.parametrize(("tokens", "experts"), [(1, 5), (4, 1), (4, 3)])
def test_equals_the_oracle_at_the_corners(tokens, experts):
  # At S = 1 and E = 1, C is clipped to [1, S]. Catches top_k with C > S.
  check_oracle(expert_choice, _oracle, *draw(3, 5, tokens, experts), capacity_factor=2.0)


def test_appended_padding_changes_nothing():
  # C is 3 both without padding and with 5 rows of padding. Catches padding that is chosen.
  check_appended_padding(
    expert_choice, longer={"capacity_factor": 2.0 * 12 / 17}, capacity_factor=2.0
  )
