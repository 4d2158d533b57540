"""T5's relative position biases: a learned number for each head and bucket of distances.

Paper: arXiv 1910.10683, Sec. 2.1.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from moe_jax.layers.init import parameter


def bucket(
  distance: Int[np.ndarray, "..."], bidirectional: bool, num_buckets: int, max_distance: int
) -> Int[np.ndarray, "..."]:
  """Returns the bucket of each distance.

  The first half of the buckets of one direction hold one distance each. The others divide the
  distances that are left into equal steps of the logarithm, and the last one holds all distances
  from `max_distance` on. The function runs on NumPy arrays before anything is traced.

  Args:
    distance: The query's position minus the key's, which is positive where the key is earlier.
    bidirectional: Whether later keys have buckets of their own, the second half. Otherwise they
      share the bucket of distance 0.
    num_buckets: Number of buckets: at least 4 if bidirectional, otherwise at least 2.
    max_distance: The distance from which on all distances share a bucket: above a quarter of
      num_buckets if bidirectional, otherwise above a half.

  Returns:
    Buckets in [0, num_buckets).
  """
  per_direction = num_buckets // 2 if bidirectional else num_buckets
  exact = per_direction // 2
  # The first distance of each wider bucket. Without the subtraction, a rounding error could push a
  # whole number up by one.
  wider = [
    math.ceil(exact * (max_distance / exact) ** (i / (per_direction - exact)) - 1e-9)
    for i in range(1, per_direction - exact)
  ]
  edges = np.asarray([*range(1, exact + 1), *wider])
  steps = np.abs(distance) if bidirectional else np.maximum(distance, 0)
  offset = per_direction * (distance < 0) if bidirectional else 0
  return offset + np.searchsorted(edges, steps, side="right")


def bias_table(module: nn.Module, num_heads: int, num_buckets: int) -> Float[Array, "H N"]:
  """Returns the float32 parameter `relative_bias` of `module`, one number per head and bucket.

  The initial values are T5X's: uniform with variance 2 / (H + N).

  Args:
    module: The attention layer, or the module that runs the stack if all its layers share a table.
    num_heads: Number of query heads H.
    num_buckets: Number of buckets N.
  """
  uniform = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
  return parameter(module, "relative_bias", uniform, (num_heads, num_buckets), ("heads", None))


def relative_bias(
  table: Float[Array, "H N"],
  distance: Int[Array, "B Lq Lk"],
  *,
  bidirectional: bool,
  max_distance: int,
) -> Float[Array, "H B Lq Lk"]:
  """Returns the biases of attention scores, which are the entries of `table` for these distances.

  Args:
    table: The result of `bias_table`.
    distance: The query's position minus the key's.
    bidirectional: See `bucket`.
    max_distance: See `bucket`.
  """
  # All farther distances share the buckets of the two outermost ones.
  distances = np.arange(-max_distance, max_distance + 1)
  by_distance = table[:, bucket(distances, bidirectional, table.shape[1], max_distance)]
  return jnp.take(
    by_distance, jnp.clip(distance, -max_distance, max_distance) + max_distance, axis=1
  )
