"""Tests which keys a query sees, and the averages that it gets of their values."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers.attend import attend, visible

pytestmark = pytest.mark.numerics

L = 6
SEGMENTS = jnp.asarray([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])


def test_visible_is_causal_within_documents():
  # Catches attention across documents, to later tokens, and from text to padding.
  expected = np.zeros((L, L), bool)
  for q in range(L):
    for k in range(q + 1):
      expected[q, k] = SEGMENTS[0, q] == SEGMENTS[0, k]
  np.testing.assert_array_equal(visible(SEGMENTS)[0], expected)


def test_visible_without_order_and_with_a_window():
  # Catches a window that is one token too wide, a window that ignores documents, and an encoder
  # that is causal.
  same = np.asarray(SEGMENTS[0][:, None] == SEGMENTS[0])
  np.testing.assert_array_equal(visible(SEGMENTS, causal=False)[0], same)
  near = np.subtract.outer(np.arange(L), np.arange(L))
  np.testing.assert_array_equal(visible(SEGMENTS, window=2)[0], same & (near >= 0) & (near <= 1))


def test_an_average_by_hand():
  # The scores are ln 1, ln 3 and, unseen, 100, so that the weights are 1/4, 3/4 and 0 of the values
  # 4, 8 and 1000. With a bias of ln 3 on the first key they are 1/2, 1/2 and 0. Catches a mask that
  # is not applied or applied after the softmax, and a bias that multiplies.
  q = jnp.ones((1, 1, 1, 1, 1))
  k = jnp.asarray([0.0, np.log(3), 100.0]).reshape(1, 3, 1, 1)
  v = jnp.asarray([4.0, 8.0, 1000.0]).reshape(1, 3, 1, 1)
  mask = jnp.asarray([[[True, True, False]]])
  bias = jnp.asarray([np.log(3), 0.0, 0.0]).reshape(1, 1, 1, 1, 3)
  np.testing.assert_allclose(attend(q, k, v, mask).item(), 7.0, rtol=1e-6)
  np.testing.assert_allclose(attend(q, k, v, mask, bias=bias).item(), 6.0, rtol=1e-6)
