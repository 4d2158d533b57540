"""The plan of tokens with different numbers of experts."""

import jax.numpy as jnp
import pytest
import reference

from moe_jax.errors import ConfigError
from moe_jax.routing import RoutingContext
from moe_jax.routing.variable import keep


def test_the_best_chosen_experts_stay():
  # Expert 3 has the highest score and is not chosen. Catches a bound that is applied before the
  # choice, padding with an expert, and a gate that is left to an assignment without expert.
  chosen = jnp.asarray([[True, True, True, False], [True, False, False, False], [True] * 4])
  scores = jnp.asarray([[1.0, 3.0, 2.0, 9.0]] * 3)
  valid = jnp.asarray([True, True, False])
  plan = keep("x", chosen, scores, 10 * scores, RoutingContext(valid=valid), 2)
  assert reference.assignments(plan) == [(0, 1, 30.0), (0, 2, 20.0), (1, 0, 10.0)]
  assert plan.expert.tolist() == [1, 2, 0, 4, 4, 4] and plan.gate.tolist()[3:] == [0, 0, 0]


def test_a_bound_out_of_range():
  with pytest.raises(ConfigError, match=r"router\.x\.most=3"):
    keep("x", jnp.ones((1, 2), bool), jnp.ones((1, 2)), jnp.ones((1, 2)), RoutingContext(), 3)
