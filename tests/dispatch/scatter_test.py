"""The scatter dispatcher, by hand. The conformance suite does the rest."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dispatch import ExpertFunction, scatter
from moe_jax.routing import RoutingPlan

pytestmark = pytest.mark.unit


class _Multiples(ExpertFunction):
  """Expert e multiplies by 10^e."""

  num_experts = 2

  def buffers(self, x):
    assert x.shape == (2, 2, 1)  # E, G*C, D
    return x * jnp.array([1.0, 10.0])[:, None, None]


def test_by_hand():
  # Two groups of two tokens, one slot an expert. Group 0: token 0 -> 1 (gate 0.5), token 1 -> 1
  # (full) and 0 (0.25). Group 1: both tokens -> 0; the second finds it full. Catches: groups that
  # share slots, y of one group in the other.
  plan = RoutingPlan(
    token=jnp.array([[0, 1, 1], [0, 1, 1]]),
    expert=jnp.array([[1, 1, 0], [0, 0, 2]]),
    gate=jnp.array([[0.5, 0.9, 0.25], [1.0, 0.9, 0.0]]),
    num_experts=2,
  )
  x = jnp.array([[[1.0], [2.0]], [[3.0], [4.0]]])
  y = scatter(plan, x, _Multiples(), 1, "cpu")
  np.testing.assert_allclose(
    y, [[[5.0], [0.5]], [[3.0], [0.0]]]
  )  # 0.5*10*1, 0.25*1*2; 1*1*3, nobody
