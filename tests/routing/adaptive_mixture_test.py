"""Tests the dense mixture of 1991 by hand and against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from oracles import adaptive_mixture as oracle
from oracles.compare import check_oracle, draw_tied_logits, draw_valid

from moe_jax.routing import RoutingContext
from moe_jax.routing.adaptive_mixture import ROUTER, adaptive_mixture

pytestmark = pytest.mark.numerics

PROBS = np.array([[0.5, 0.3, 0.2], [0.3, 0.1, 0.6], [0.8, 0.15, 0.05], [0.1, 0.7, 0.2]])
LOGITS = jnp.log(jnp.asarray(PROBS, jnp.float32))


def test_by_hand():
  # The softmax of log probabilities gives the probabilities, in the order of tokens. Catches
  # expert-major order, and a softmax over tokens.
  plan = adaptive_mixture(LOGITS, RoutingContext())
  assert [(t, e, round(g, 4)) for t, e, g in reference.assignments(plan)] == [
    (0, 0, 0.5),
    (0, 1, 0.3),
    (0, 2, 0.2),
    (1, 0, 0.3),
    (1, 1, 0.1),
    (1, 2, 0.6),
    (2, 0, 0.8),
    (2, 1, 0.15),
    (2, 2, 0.05),
    (3, 0, 0.1),
    (3, 1, 0.7),
    (3, 2, 0.2),
  ]


@pytest.mark.parametrize(("tokens", "experts"), [(12, 6), (1, 6), (12, 1)])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_the_oracle(tokens, experts, padded):
  # Catches padding that is served, and sums over the wrong axis if E or S is 1.
  rng = np.random.default_rng(0)
  context = RoutingContext(valid=draw_valid(rng, 50, tokens) if padded else None)
  check_oracle(
    adaptive_mixture, oracle.adaptive_mixture, draw_tied_logits(rng, 50, tokens, experts), context
  )


def test_padding_changes_nothing_for_others():
  # Catches padding that changes the order of other tokens or has a gate.
  padded = jnp.concatenate([LOGITS, 9.0 * jnp.ones((2, 3))])
  plan = adaptive_mixture(padded, RoutingContext(valid=jnp.arange(6) < 4))
  assert reference.assignments(plan) == reference.assignments(
    adaptive_mixture(LOGITS, RoutingContext())
  )
  assert not np.any(plan.gate[12:]) and np.all(plan.expert[12:] == 3)


def test_router_learns():
  # d sum p_i^2 / dx_j = 2 p_j (p_j - sum_i p_i^2). Catches a stop_gradient on the gates.
  gradient = jax.grad(lambda l: jnp.sum(jnp.square(adaptive_mixture(l, RoutingContext()).gate)))(
    LOGITS
  )
  np.testing.assert_allclose(
    gradient, 2 * PROBS * (PROBS - (PROBS**2).sum(-1, keepdims=True)), rtol=1e-4, atol=1e-6
  )


def test_bfloat16_logits_are_softmaxed_in_float32():
  # Catches a softmax in the model's dtype, whose sum differs from 1 by up to 2^-8.
  gate = adaptive_mixture(LOGITS.astype(jnp.bfloat16), RoutingContext()).gate
  assert gate.dtype == jnp.float32
  np.testing.assert_allclose(np.asarray(gate).reshape(4, 3).sum(-1), 1.0, rtol=1e-6)


def test_never_looks_ahead():
  # Catches a declared leak of "overflow", which would be wrong because no expert serves a later
  # token before an earlier one.
  plan = adaptive_mixture(LOGITS, RoutingContext())
  assert ROUTER.leak() == "no" and np.all(np.diff(plan.token) >= 0)
