"""Rows to slots and back: values against NumPy loops, derivatives against those of plain
indexing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dispatch.routes import (
  combine,
  gather_sum,
  make_routes,
  read_assignments,
  read_slots,
  take,
)

pytestmark = pytest.mark.unit

# Three tokens, four slots, five assignments. Token 1 has three assignments, one of them without a
# slot (4 = P); token 0 has none, token 2 two. Slot 1 is empty.
TOKEN, SLOT = jnp.array([1, 2, 1, 1, 2]), jnp.array([2, 0, 4, 3, 4])
ROWS = jnp.arange(8.0).reshape(4, 2)
WEIGHT = jnp.array([1.0, 10.0, 100.0, 1000.0, 10000.0])


def routes():
  return make_routes(TOKEN, SLOT, tokens=3, slots=4)


def test_slots_know_their_token_and_assignment():
  # Catches: the inverse map built from token instead of assignment; an empty slot that reads
  # assignment 0.
  r = routes()
  np.testing.assert_array_equal(r.assignment, [1, 5, 0, 3])  # 5 = nobody
  np.testing.assert_array_equal(np.asarray(r.token)[[0, 2, 3]], [2, 1, 1])
  np.testing.assert_array_equal(r.count, [0, 2, 1])  # assignments that have a slot


def test_gather_sum_adds_each_tokens_rows():
  # Token 1: 1 * rows[2] + 1000 * rows[3] = [4 + 6000, 5 + 7000]; token 2: 10 * rows[0] = [0, 10];
  # token 0: nothing. Catches: assignments without a slot that read some row; tokens with fewer
  # assignments than the busiest.
  np.testing.assert_array_equal(gather_sum(ROWS, WEIGHT, routes()), [[0, 0], [6004, 7005], [0, 10]])


def test_read_slots_and_assignments():
  # Catches: a fill value that is not 0 where there is nothing to read.
  values = jnp.array([1.0, 2.0, 3.0, 4.0])
  np.testing.assert_array_equal(read_slots(values, routes()), [3, 1, 0, 4, 0])
  np.testing.assert_array_equal(read_assignments(WEIGHT, routes()), [10, 0, 1, 1000])


def test_derivatives_equal_those_of_scatters():
  # Catches: a custom derivative that forgets a token's second assignment, or counts an empty slot.
  def plain(x, gate):
    rows = jnp.sin(x[TOKEN])
    has_slot = SLOT < 4
    return jnp.sum(
      jnp.zeros_like(x).at[TOKEN].add(jnp.where(has_slot, gate, 0)[:, None] * rows) ** 2
    )

  def routed(x, gate):
    return jnp.sum(combine(jnp.sin(take(x, routes())), gate, routes()) ** 2)

  x, gate = jax.random.normal(jax.random.key(0), (3, 2)), WEIGHT / 100
  for ours, theirs in zip(
    jax.grad(routed, (0, 1))(x, gate), jax.grad(plain, (0, 1))(x, gate), strict=True
  ):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
