"""Tests the values of routes against results by hand, and derivatives against plain indexing."""

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

# There are three tokens, four slots and five assignments. Token 0 has no assignment. Token 1 has
# three, one of which has no slot (4 = P). Token 2 has two, one of which has no slot. Slot 1 is
# empty.
TOKEN, SLOT = jnp.array([1, 2, 1, 1, 2]), jnp.array([2, 0, 4, 3, 4])
ROWS = jnp.arange(8.0).reshape(4, 2)
WEIGHT = jnp.array([1.0, 10.0, 100.0, 1000.0, 10000.0])


def routes():
  return make_routes(TOKEN, SLOT, tokens=3, slots=4)


def test_slots_know_their_token_and_assignment():
  # Catches an inverse map that is built from tokens instead of assignments, and an empty slot that
  # reads assignment 0.
  r = routes()
  np.testing.assert_array_equal(r.assignment, [1, 5, 0, 3])  # 5 = A marks an empty slot.
  np.testing.assert_array_equal(np.asarray(r.token)[[0, 2, 3]], [2, 1, 1])
  np.testing.assert_array_equal(r.count, [0, 2, 1])  # Only assignments with a slot count.


def test_gather_sum_adds_each_tokens_rows():
  # Token 1 gets 1 * rows[2] + 1000 * rows[3] = [4 + 6000, 5 + 7000], token 2 gets 10 * rows[0] =
  # [0, 10], and token 0 gets nothing. Catches assignments without a slot that read some row, and
  # wrong sums for tokens with fewer assignments than the token with the most.
  np.testing.assert_array_equal(gather_sum(ROWS, WEIGHT, routes()), [[0, 0], [6004, 7005], [0, 10]])


def test_read_slots_and_assignments():
  # Catches a fill value that is not 0 if there is nothing to read.
  values = jnp.array([1.0, 2.0, 3.0, 4.0])
  np.testing.assert_array_equal(read_slots(values, routes()), [3, 1, 0, 4, 0])
  np.testing.assert_array_equal(read_assignments(WEIGHT, routes()), [10, 0, 1, 1000])


def test_derivatives_equal_those_of_scatters():
  # Catches a custom derivative that omits the second assignment of a token or counts an empty slot.
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
