"""Tests the scatter dispatcher by hand. `conformance_test` does the rest."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dispatch import ExpertFunction, scatter
from moe_jax.routing import RoutingPlan

pytestmark = pytest.mark.unit


class _Multiples(ExpertFunction):
  """Experts that multiply by 10^e."""

  num_experts = 2

  def buffers(self, x):
    assert x.shape == (2, 2, 1)  # E, G*C, D
    return x * jnp.array([1.0, 10.0])[:, None, None]


def test_by_hand():
  # There are two groups of two tokens, and one slot per expert. In group 0, token 0 chooses expert
  # 1 (gate 0.5), and token 1 chooses expert 1, which is full, and expert 0 (gate 0.25). In group 1,
  # both tokens choose expert 0, which is full for the second. Catches groups that share slots, and
  # outputs of one group in the other.
  plan = RoutingPlan(
    token=jnp.array([[0, 1, 1], [0, 1, 1]]),
    expert=jnp.array([[1, 1, 0], [0, 0, 2]]),
    gate=jnp.array([[0.5, 0.9, 0.25], [1.0, 0.9, 0.0]]),
    num_experts=2,
  )
  x = jnp.array([[[1.0], [2.0]], [[3.0], [4.0]]])
  y = scatter(plan, x, _Multiples(), 1, "cpu")
  # The outputs are 0.5*10*1 and 0.25*1*2 in group 0, and 1*1*3 and nothing in group 1.
  np.testing.assert_allclose(y, [[[5.0], [0.5]], [[3.0], [0.0]]])
