"""BASE layers, by hand and against the oracle. The assignment itself: auction_test.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from oracles import compare
from oracles.base import base as oracle

from moe_jax.errors import ConfigError
from moe_jax.routing import RoutingContext
from moe_jax.routing.base import ROUTER, base

pytestmark = pytest.mark.numerics

LOGITS = jnp.array([[2.0, 0.0], [2.0, 1.0], [1.5, 1.0], [1.0, 1.0]])


_base = jax.jit(base)


def _triples(logits, context):
  return [(t, e, round(g, 4)) for t, e, g in reference.assignments(_base(logits, context))]


def test_by_hand():
  # All like expert 0, by 2, 1, 0.5 and 0; two may have it: tokens 0 and 1. (The next best loses
  # 0.5; the bound is 4 * 0.01 * 2.) sigmoid(2) = 0.8808, sigmoid(1) = 0.7311. Catches: a softmax
  # gate, no balance, the order of bids.
  expected = [(0, 0, 0.8808), (1, 0, 0.8808), (2, 1, 0.7311), (3, 1, 0.7311)]
  assert _triples(LOGITS, RoutingContext(train=True)) == expected


def test_greedy_outside_training():
  # sigmoid(1.5) = 0.8176; the tie goes to expert 0. Catches: balance at inference, where tokens
  # come one by one.
  expected = [(0, 0, 0.8808), (1, 0, 0.8808), (2, 0, 0.8176), (3, 0, 0.7311)]
  assert _triples(LOGITS, RoutingContext(train=False)) == expected


@pytest.mark.parametrize("train", [True, False])
def test_equals_the_oracle(train):
  # At epsilon 1/64 float32 is exact on these logits. Catches: padding that bids, a gate of another
  # expert.
  compare.check_oracle(
    base, oracle, compare.draw_logits(1), compare.draw_context(1, train=train), epsilon=1 / 64
  )


@pytest.mark.parametrize(("tokens", "experts"), [(4, 1), (1, 6)])
def test_corners(tokens, experts):
  # Catches: E = 1, S = 1.
  logits, context = (
    compare.draw_logits(3, 5, tokens, experts, tied=0),
    compare.draw_context(3, 5, tokens),
  )
  compare.check_oracle(base, oracle, logits, context, epsilon=1 / 64)


def test_appended_padding_changes_nothing():
  # Catches: places counted over all rows.
  compare.check_appended_padding(base)


def test_router_gradient():
  # d sin(g) / d logit = cos(g) g (1 - g) at the assigned expert, 0 elsewhere. Catches: a gradient
  # through the auction (which has none), a gate cut off from the logits.
  (gradient,) = compare.gradients(base, LOGITS, RoutingContext(train=True), [{}])
  g = 1 / (1 + np.exp(-np.array([2.0, 2.0, 1.0, 1.0])))
  slope = np.cos(g) * g * (1 - g)
  np.testing.assert_allclose(
    gradient, [[slope[0], 0], [slope[1], 0], [0, slope[2]], [0, slope[3]]], rtol=1e-5
  )


@pytest.mark.parametrize("epsilon", [0.0, -1.0, 1.5])
def test_bad_epsilon_is_named(epsilon):
  # Catches: an auction without a step, which need not end.
  with pytest.raises(ConfigError, match="base.epsilon"):
    base(LOGITS, RoutingContext(), epsilon=epsilon)


def test_bfloat16_logits_give_float32_gates():
  # Catches: prices and gates in the model's dtype.
  plan = _base(LOGITS.astype(jnp.bfloat16), RoutingContext(train=True))
  assert plan.gate.dtype == jnp.float32 and plan.expert.tolist() == [0, 0, 1, 1]


def test_looks_ahead():
  # Token 0 alone gets expert 0; before three that like it more, it does not. Catches: another
  # answer than "yes".
  assert ROUTER.leak() == "yes"
  later = jnp.array([[1.0, 0.5], [3.0, 0.0], [3.0, 0.0], [3.0, 2.5]])
  assert _triples(later[:1], RoutingContext(train=True))[0][1] == 0
  assert _triples(later, RoutingContext(train=True))[0][1] == 1
