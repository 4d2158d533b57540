"""Tests the gathering dispatcher with a very uneven load. `conformance_test` does the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moe_jax.dispatch import all_gather
from moe_jax.errors import ConfigError
from moe_jax.experts import Experts
from moe_jax.routing import RoutingPlan
from moe_jax.sharding import make_mesh

pytestmark = pytest.mark.unit


def test_one_expert_takes_all():
  # Expert e computes relu(x) times 10^e. All eight tokens visit expert 3, which is on the last of
  # four devices, and those with an even number also visit expert 0. Catches rows that are added to
  # the tokens of another device, and experts that are numbered by device.
  eye = jnp.eye(2)
  experts = Experts(
    jnp.stack([eye] * 4), jnp.stack([10.0**e * eye for e in range(4)]), None, "relu"
  )
  token = jnp.tile(jnp.array([0, 1, 0, 1]), (4, 1))
  plan = RoutingPlan(
    token=token,
    expert=jnp.tile(jnp.array([3, 3, 0, 4]), (4, 1)),
    gate=jnp.ones((4, 4)),
    num_experts=4,
  )
  x = jnp.arange(16.0).reshape(4, 2, 2)
  with jax.set_mesh(make_mesh({"expert": 4})):
    y = tiny.quick_jit(lambda x: all_gather(plan, x, experts, None, "tpu"))(x)
  np.testing.assert_allclose(y, x * np.array([1001.0, 1000.0])[:, None])


def test_an_unknown_platform_is_named():
  # Catches a silent fallback.
  one = jnp.ones((1, 1, 1))
  plan = RoutingPlan(
    token=jnp.zeros((1, 1), int), expert=jnp.zeros((1, 1), int), gate=one[0], num_experts=1
  )
  with pytest.raises(ConfigError, match="platform='abacus'"):
    all_gather(plan, one, Experts(one, one, None, "relu"), None, "abacus")
