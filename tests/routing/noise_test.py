"""Tests the noise of routers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import noise

pytestmark = pytest.mark.unit


def test_jitter():
  # Catches additive noise, noise in bfloat16 (with steps of 2^-8 near 1), a range of [1, 1 + 2
  # eps], and one factor for all elements.
  x = 8.0 * jnp.ones((64, 32), jnp.bfloat16)
  ratio = np.asarray(noise.jitter(jax.random.key(0), x, 0.01)) / 8.0
  assert ratio.dtype == np.float32 and len(np.unique(ratio)) > 1000
  assert 0.99 <= ratio.min() < 0.9905 and 1.0095 < ratio.max() <= 1.01
  assert np.all(noise.jitter(jax.random.key(0), x, 0.0) == 8.0)


def test_microbatches_draw_their_own_part():
  # Four rows of two groups are split into two microbatches, with rows 0 and 2, and rows 1 and 3.
  # Catches the first groups for all microbatches, groups of one row in different microbatches, and
  # different values if the batch is not split.
  def draw(groups):
    return jnp.arange(10 * groups).reshape(groups, 10)

  def own(index, block):
    return noise.own(draw, 4, noise.Place(index, 2, block))[:, 0].tolist()

  assert own(0, 2) == [0, 10, 40, 50] and own(1, 2) == [20, 30, 60, 70]
  assert own(0, 1) == [0, 20, 40, 60] and own(1, 1) == [10, 30, 50, 70]
  np.testing.assert_array_equal(noise.own(draw, 4, None), draw(4))


def test_jitter_of_microbatches():
  # Catches jitter that ignores the position of the microbatch or draws different factors for the
  # first microbatch.
  x, key = jnp.ones((6, 5, 3)), jax.random.key(1)
  whole = noise.jitter(key, x, 0.5)
  for m in range(3):
    np.testing.assert_array_equal(noise.jitter(key, x[m::3], 0.5, noise.Place(m, 3)), whole[m::3])
