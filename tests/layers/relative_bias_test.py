"""Tests T5's buckets of distances by hand and by the formula of the paper's code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_jax.layers.relative_bias import bias_table, bucket, relative_bias

pytestmark = pytest.mark.unit


def test_causal_buckets_by_hand():
  # There are 32 buckets up to 128. The first 16 hold one distance each, and the others begin at
  # 16 * 8^(i/16) for i = 0, 1, ...: 16 18.2 20.7 23.6 26.9 30.6 34.9 39.7 45.2 51.5 58.7 66.8 76.1
  # 86.7 98.7 112.4. Catches bounds that are rounded down or pushed up by a rounding error, and a
  # last bucket that begins late.
  def of(*distances):
    return bucket(np.asarray(distances), False, 32, 128).tolist()

  assert of(*range(16)) == list(range(16))
  assert of(16, 18, 19, 20, 21, 23, 24, 26, 27) == [16, 16, 17, 17, 18, 18, 19, 19, 20]
  assert of(98, 99, 112, 113, 127, 128, 129, 10_000) == [29, 30, 30, 31, 31, 31, 31, 31]
  # Negative distances belong to later keys, which a causal query does not see.
  assert of(-1, -500) == [0, 0]
  # In floating point, 10 * 32^(8/10) = 160 is 160.00000000000003.
  assert bucket(np.asarray([159, 160]), False, 20, 320).tolist() == [17, 18]


def test_two_sided_buckets_by_hand():
  # Each side has 16 buckets. The first 8 hold one distance each, and the others begin at
  # 8 * 16^(i/8): 8 11.3 16 22.6 32 45.3 64 90.5. Later keys take the second half. Catches bounds
  # that are rounded down, exchanged sides, and a nearest later key in the bucket of distance 0.
  def of(*distances):
    return bucket(np.asarray(distances), True, 32, 128).tolist()

  assert of(*range(8)) == list(range(8))
  assert of(8, 11, 12, 15, 16, 22, 23, 31, 32, 45, 46, 63, 64, 90, 91, 128) == [
    8,
    8,
    9,
    9,
    10,
    10,
    11,
    11,
    12,
    12,
    13,
    13,
    14,
    14,
    15,
    15,
  ]
  assert of(-1, -7, -8, -16, -128, -999) == [17, 23, 24, 26, 31, 31]


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("buckets, reach", [(32, 128), (8, 20), (64, 500), (4, 4)])
def test_the_papers_formula(buckets, reach, two_sided):
  # T5's code takes the floor of log(n / exact) / log(max / exact) * (buckets - exact). Here it is
  # computed in float64, with an epsilon against rounding errors.
  distance = np.arange(-2 * reach, 2 * reach + 1)
  side = buckets // 2 if two_sided else buckets
  exact = side // 2
  n = np.abs(distance) if two_sided else np.maximum(distance, 0)
  log = np.log(np.maximum(n, 1) / exact) / np.log(reach / exact) * (side - exact) + 1e-9
  expected = np.where(n < exact, n, np.minimum(exact + np.floor(log).astype(int), side - 1))
  np.testing.assert_array_equal(
    bucket(distance, two_sided, buckets, reach), expected + side * (two_sided & (distance < 0))
  )


class Bias(nn.Module):
  @nn.compact
  def __call__(self, distance):
    return relative_bias(bias_table(self, 2, 8), distance, bidirectional=True, max_distance=6)


def test_bias_is_looked_up_by_head_and_distance():
  # Catches exchanged heads, and a clip that moves far distances into a nearer bucket or to the
  # other side.
  distance = jnp.asarray([[[0, 1, -1], [5, 6, 700], [-6, -700, 2]]])
  boxed = Bias().init(jax.random.key(0), distance)["params"]["relative_bias"]
  assert boxed.names == ("heads", None) and boxed.value.shape == (2, 8)
  weight = jnp.arange(16.0).reshape(2, 8)
  y = Bias().apply({"params": {"relative_bias": weight}}, distance)
  # Each side has four buckets, two of them exact: 0, 1, 2 to 3, and 4 or more, because the last one
  # begins at 2 * 3^(1/2) = 3.5.
  expected = np.asarray([[0, 1, 5], [3, 3, 3], [7, 7, 2]])
  np.testing.assert_array_equal(y[:, 0], np.stack([expected, expected + 8]))
