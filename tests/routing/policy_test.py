"""Tests the policies for keeping a token's choices after the first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import RoutingContext
from moe_jax.routing.policy import POLICIES

pytestmark = pytest.mark.unit

GATE = jnp.array([0.0, 0.1, 0.2, 0.3])


def test_policies():
  # Catches >= instead of >, and a policy with the name of another.
  def keep(name, context=RoutingContext()):
    return POLICIES[name](GATE, 0.2, context).tolist()

  assert keep("threshold") == [False, False, False, True]
  assert keep("all") == keep("random") == keep("random", RoutingContext(train=True)) == [True] * 4
  assert keep("random", RoutingContext(key=jax.random.key(0))) == [True] * 4  # outside training


def test_random_keeps_in_proportion():
  # The probabilities min(1, gate / 0.2) are 0, 0.5, 1 and 1. Catches r < gate, and one random
  # number for all choices.
  gate, context = jnp.tile(GATE, (4000, 1)), RoutingContext(key=jax.random.key(0), train=True)
  np.testing.assert_allclose(
    jnp.mean(POLICIES["random"](gate, 0.2, context), axis=0), [0, 0.5, 1, 1], atol=0.03
  )
