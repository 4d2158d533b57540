"""The all-to-all dispatcher by hand: who is served does not depend on where tokens lie. The tables
do the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moe_jax.dispatch import all_to_all
from moe_jax.experts import Experts
from moe_jax.routing import RoutingPlan
from moe_jax.sharding import make_mesh

pytestmark = pytest.mark.unit


def test_each_group_has_its_own_slots():
  # relu(x) times 10^e. Of each group both tokens want expert 1, which has one slot a group, the
  # second token first. Catches: slots shared by groups, so that the first device's tokens take all;
  # slots filled by token.
  eye = jnp.eye(2)
  experts = Experts(jnp.stack([eye] * 2), jnp.stack([eye, 10 * eye]), None, "relu")
  plan = RoutingPlan(
    token=jnp.tile(jnp.array([1, 0]), (4, 1)),
    expert=jnp.ones((4, 2), int),
    gate=jnp.ones((4, 2)),
    num_experts=2,
  )
  x = 1 + jnp.arange(16.0).reshape(4, 2, 2)
  expected = x * np.array([0.0, 10.0])[:, None]
  for sizes in ({"data": 1}, {"expert": 2}, {"data": 2, "expert": 2}):
    with jax.set_mesh(make_mesh(sizes)):
      np.testing.assert_allclose(
        tiny.quick_jit(lambda x: all_to_all(plan, x, experts, 1, "cpu"))(x), expected
      )
