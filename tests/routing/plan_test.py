"""Tests how JAX transforms plans and contexts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import RoutingContext, RoutingPlan, group_axes

pytestmark = pytest.mark.unit


def test_number_of_experts_is_static():
  # Catches num_experts as a leaf, which would be a tracer although shapes depend on it.
  plan = RoutingPlan(
    token=jnp.array([0, 1]), expert=jnp.array([1, 3]), gate=jnp.array([0.5, 0.0]), num_experts=3
  )
  assert len(jax.tree.leaves(plan)) == 3
  assert jax.jit(lambda p: jnp.zeros(p.num_experts))(plan).shape == (3,)


@pytest.mark.parametrize("masked", [True, False])
def test_group_axes(masked):
  # Catches a bias or salt that vmap splits over groups, a mask, key or index that groups share, and
  # a None that vmap tries to map.
  context = RoutingContext(
    key=jax.random.split(jax.random.key(0), 2),
    bias=jnp.array([1.0, 2.0, 3.0]),
    train=True,
    salt=jnp.uint32(5),
    group=jnp.arange(2),
    valid=jnp.array([[True, False], [True, True]]) if masked else None,
  )

  def look(x, context):
    assert (
      context.bias.shape == (3,)
      and context.key.shape == ()
      and context.token_ids is None
      and context.train
    )
    assert context.salt.shape == context.group.shape == ()
    return x * jnp.sum(context.bias) + (jnp.sum(context.valid) if masked else 0)

  y = jax.vmap(look, in_axes=(0, group_axes(context)))(jnp.array([1.0, 2.0]), context)
  np.testing.assert_array_equal(y, [7.0, 14.0] if masked else [6.0, 12.0])
