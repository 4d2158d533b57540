"""Tests BASE layers by hand and against the oracle. auction_test.py tests the assignment."""

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
  # All tokens prefer expert 0, by 2, 1, 0.5 and 0, and it serves two of them: tokens 0 and 1. (The
  # next best assignment loses 0.5, which exceeds the bound of 4 * 0.01 * 2.) sigmoid(2) is 0.8808
  # and sigmoid(1) is 0.7311. Catches a softmax gate, missing balance, and a wrong order of bids.
  expected = [(0, 0, 0.8808), (1, 0, 0.8808), (2, 1, 0.7311), (3, 1, 0.7311)]
  assert _triples(LOGITS, RoutingContext(train=True)) == expected


def test_greedy_outside_training():
  # sigmoid(1.5) is 0.8176, and expert 0 wins the tie. Catches balance at inference, where tokens
  # arrive one by one.
  expected = [(0, 0, 0.8808), (1, 0, 0.8808), (2, 0, 0.8176), (3, 0, 0.7311)]
  assert _triples(LOGITS, RoutingContext(train=False)) == expected


@pytest.mark.parametrize("train", [True, False])
def test_equals_the_oracle(train):
  # With epsilon 1/64, float32 is exact on these logits. Catches padding that bids, and the gate of
  # another expert.
  compare.check_oracle(
    base, oracle, compare.draw_logits(1), compare.draw_context(1, train=train), epsilon=1 / 64
  )


@pytest.mark.parametrize(("tokens", "experts"), [(4, 1), (1, 6)])
def test_corners(tokens, experts):
  # Catches errors at E = 1 and S = 1.
  logits, context = (
    compare.draw_logits(3, 5, tokens, experts, tied=0),
    compare.draw_context(3, 5, tokens),
  )
  compare.check_oracle(base, oracle, logits, context, epsilon=1 / 64)


def test_appended_padding_changes_nothing():
  # Catches a number of places that is computed from all rows.
  compare.check_appended_padding(base)


def test_router_gradient():
  # d sin(g) / d logit is cos(g) g (1 - g) at the assigned expert and 0 elsewhere. Catches a
  # gradient through the auction (which must have none), and a gate without gradient.
  (gradient,) = compare.gradients(base, LOGITS, RoutingContext(train=True), [{}])
  g = 1 / (1 + np.exp(-np.array([2.0, 2.0, 1.0, 1.0])))
  slope = np.cos(g) * g * (1 - g)
  np.testing.assert_allclose(
    gradient, [[slope[0], 0], [slope[1], 0], [0, slope[2]], [0, slope[3]]], rtol=1e-5
  )


@pytest.mark.parametrize("epsilon", [0.0, -1.0, 1.5])
def test_bad_epsilon_is_named(epsilon):
  # Catches an auction with a step of 0, which may not end.
  with pytest.raises(ConfigError, match="base.epsilon"):
    base(LOGITS, RoutingContext(), epsilon=epsilon)


def test_bfloat16_logits_give_float32_gates():
  # Catches prices and gates in the model's dtype.
  plan = _base(LOGITS.astype(jnp.bfloat16), RoutingContext(train=True))
  assert plan.gate.dtype == jnp.float32 and plan.expert.tolist() == [0, 0, 1, 1]


def test_looks_ahead():
  # Token 0 gets expert 0 if it is alone, but not if three tokens follow that prefer expert 0 more
  # strongly. Catches a declared leak other than "yes".
  assert ROUTER.leak() == "yes"
  later = jnp.array([[1.0, 0.5], [3.0, 0.0], [3.0, 0.0], [3.0, 2.5]])
  assert _triples(later[:1], RoutingContext(train=True))[0][1] == 0
  assert _triples(later, RoutingContext(train=True))[0][1] == 1
