"""Tests by hand that the all-to-all dispatcher serves the same tokens on every mesh.

`conformance_test` and `expert_mesh_test` do the rest.
"""

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
  # Expert e computes relu(x) times 10^e. Both tokens of each group choose expert 1, which has one
  # slot per group, and the plan lists the second token first. Catches slots that groups share, so
  # that the tokens of the first device take all of them, and slots that are filled in the order of
  # tokens.
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
