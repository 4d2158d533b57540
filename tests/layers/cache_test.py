"""The slots of a cache are compared with a list of everything that was written."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_jax.layers.cache import Cached, remember, visible_places

pytestmark = pytest.mark.unit
N = 9


class Layer(nn.Module):
  """Keeps one array, and returns what its queries may read."""

  window: int

  @nn.compact
  def __call__(self, cached, new):
    return remember(self, cached, {"key": new}, (None,), self.window)


@pytest.mark.parametrize("window", [0, 1, 3, 20])
@pytest.mark.parametrize("pieces", [[1] * N, [4, 1, 1, 3], [2, 5, 2]], ids=str)
def test_queries_see_the_entries_of_their_window(window, pieces):
  # Catches a slot that is overwritten too early, a place that is off by one, entries of an empty
  # cache, and a window that is one entry too long. Place p has the entry p + 1.
  segments = jnp.ones((2, N), jnp.int32).at[1, :2].set(0)
  cache, index = {}, 0
  for length in pieces:
    cached = Cached(jnp.int32(index), segments)
    new = jnp.tile(jnp.arange(index, index + length)[None, :, None] + 1.0, (2, 1, 1))
    (kept, places), cache = Layer(window).apply(cache, cached, new, mutable=["cache"])
    seen = visible_places(cached, segments[:, index : index + length], places, window)
    for row, first in enumerate((0, 2)):
      for query in range(length):
        place = index + query
        if place >= first:
          entries = np.sort(np.asarray(kept["key"])[row, np.asarray(seen[row, query]), 0])
          oldest = max(first, place - window + 1) if window else first
          np.testing.assert_array_equal(entries, np.arange(oldest, place + 1) + 1)
    index += length
  assert cache["cache"]["key"].shape[1] == min(window or N, N)
