"""Compares values and derivatives of experts on chunks with those of one expert at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dispatch.chunks import apply_chunks
from moe_jax.dispatch.routes import make_routes
from moe_jax.dispatch.size_classes import layout
from moe_jax.experts import Experts

pytestmark = pytest.mark.numerics

# The rows of each expert: none, some, few, and several chunks of the largest class.
LOADS = (0, 19, 3, 42)


def setup():
  keys = jax.random.split(jax.random.key(0), 5)
  experts = Experts(
    up=jax.random.normal(keys[0], (4, 6, 5)),
    down=jax.random.normal(keys[1], (4, 5, 6)),
    gate=jax.random.normal(keys[2], (4, 6, 5)),
    activation="swiglu",
  )
  rows = sum(LOADS)
  return jax.random.normal(keys[3], (rows, 6)), jax.random.uniform(keys[4], (rows,)), experts


def chunked(x, gate, experts):
  """Computes the experts by chunks, where assignment a belongs to token a.

  The rows of the experts are in the order that the layout requires.
  """
  where = layout(jnp.array(LOADS), sum(LOADS))
  expert = jnp.repeat(jnp.arange(4), jnp.array(LOADS), total_repeat_length=sum(LOADS))
  rank = jnp.arange(sum(LOADS)) - jnp.cumsum(jnp.array((0, *LOADS[:-1])))[expert]
  slot = where.first[expert] + rank
  return apply_chunks(
    x,
    gate,
    experts,
    make_routes(jnp.arange(sum(LOADS)), slot, sum(LOADS), sum(LOADS) + where.classes[-1]),
    where,
  )


def one_by_one(x, gate, experts):
  ends = np.cumsum((0, *LOADS))
  parts = []
  for e in range(4):
    w = jax.tree.map(lambda leaf, e=e: leaf[e], experts.weights)
    parts.append(experts.output(w, experts.hidden(w, x[ends[e] : ends[e + 1]])))
  return gate[:, None] * jnp.concatenate(parts)


def test_values_and_derivatives_equal_one_expert_at_a_time():
  # Catches a chunk that permanently overwrites rows of another expert, such rows in a weight
  # gradient, an expert without rows whose gradient is not 0, and a gradient of a gate that is read
  # from the wrong slot.
  args = setup()
  np.testing.assert_allclose(chunked(*args), one_by_one(*args), rtol=1e-5, atol=1e-5)
  grads = [
    jax.grad(lambda *a, f=f: jnp.sum(jnp.cos(f(*a))), (0, 1, 2))(*args)
    for f in (chunked, one_by_one)
  ]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *grads)
  assert not jnp.any(grads[0][2].up[0])
