"""T5's relative positions: a learned number for each head and each bucket of distances (arXiv
1910.10683, Sec. 2.1)."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int


def bucket(
  distance: Int[np.ndarray, "..."], bidirectional: bool, num_buckets: int, max_distance: int
) -> Int[np.ndarray, "..."]:
  """Which bucket each distance falls into: one bucket a distance at first, then ever wider ones up
  to `max_distance`.

  Of the buckets of one direction the first half hold one distance each; the others divide what is
  left in equal steps of the logarithm, and the last one holds all from `max_distance` on. Computed
  before anything is traced.

  Args:
    distance: the query's position minus the key's: positive where the key is earlier.
    bidirectional: the second half of the buckets is for later keys; otherwise later keys share the
      bucket of 0.
    num_buckets: at least 4 if bidirectional, else at least 2.
    max_distance: above a quarter of num_buckets if bidirectional, else above a half.

  Returns:
    In [0, num_buckets).
  """
  buckets = num_buckets // 2 if bidirectional else num_buckets  # of one direction
  exact = buckets // 2
  # The first distance of buckets 1, 2, ...; less a rounding error, which would push a whole number
  # up by one.
  wider = [
    math.ceil(exact * (max_distance / exact) ** (i / (buckets - exact)) - 1e-9)
    for i in range(1, buckets - exact)
  ]
  edges = np.asarray([*range(1, exact + 1), *wider])
  steps = np.abs(distance) if bidirectional else np.maximum(distance, 0)
  later = buckets * (distance < 0) if bidirectional else 0
  return later + np.searchsorted(edges, steps, side="right")


def bias_table(module: nn.Module, num_heads: int, num_buckets: int) -> Float[Array, "H N"]:
  """Parameter `relative_bias` of `module`, a number for each of H heads and N buckets; float32.

  The module is an attention layer or, where all layers of a stack share one table, what runs the
  stack. The first values are T5X's: uniform, of variance 2 / (H + N).
  """
  first = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
  return module.param(
    "relative_bias",
    nn.with_logical_partitioning(first, ("heads", None)),
    (num_heads, num_buckets),
    jnp.float32,
  )


def relative_bias(
  table: Float[Array, "H N"],
  distance: Int[Array, "B Lq Lk"],
  *,
  bidirectional: bool,
  max_distance: int,
) -> Float[Array, "H B Lq Lk"]:
  """What is added to attention scores: the entries of a `bias_table` for these distances, which are
  as in `bucket`."""
  reach = np.arange(
    -max_distance, max_distance + 1
  )  # all farther distances are in the buckets of the outermost two
  of_distance = table[:, bucket(reach, bidirectional, table.shape[1], max_distance)]
  return jnp.take(
    of_distance, jnp.clip(distance, -max_distance, max_distance) + max_distance, axis=1
  )
