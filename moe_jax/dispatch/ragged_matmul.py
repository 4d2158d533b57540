"""Matrix products of rows that are sorted by expert, for platforms with a grouped kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.dispatch.size_classes import Layout, layout

# Before this version of JAX, XLA computes the gradient of the weights of `jax.lax.ragged_dot` on
# TPUs as a masked product of all rows for every expert.
_FIXED = (0, 12, 0)
# The chunk sizes as multiples of the balanced load. Padding costs only in this third of a layer's
# FLOPs, and the TPU's compiler takes seconds for each size, so that few sizes are better here.
STEPS = (1.0, 0.5, 0.25, 0.125)


def ragged_matmul(
  rows: Float[Array, "N D"], weights: Float[Array, "E D F"], group_sizes: Int[Array, "E"]
) -> Float[Array, "N F"]:
  """Returns the product of each row with its expert's matrix, as `jax.lax.ragged_dot` does.

  The FLOPs are those of the rows, in the forward and in the backward pass, on TPUs. Only first
  derivatives are supported where the installed JAX needs help.

  Args:
    rows: The rows, sorted by expert. The results for rows after the last group are undefined.
    weights: The matrices of the E experts.
    group_sizes: The number of rows of each expert.
  """
  if jax.__version_info__ >= _FIXED:
    return jax.lax.ragged_dot(rows, weights, group_sizes)
  return _with_loops(rows, weights, group_sizes)


@jax.custom_vjp
def _with_loops(rows, weights, group_sizes):
  """Computes `ragged_matmul` with a backward pass that has loops for the weights' gradient."""
  return jax.lax.ragged_dot(rows, weights, group_sizes)


def _forward(rows, weights, group_sizes):
  """Computes `ragged_matmul`, and saves its arguments."""
  return _with_loops(rows, weights, group_sizes), (rows, weights, group_sizes)


def _backward(residuals, d_out):
  """Returns the gradients of the rows and of the weights."""
  rows, weights, group_sizes = residuals
  d_rows = jax.lax.ragged_dot(d_out, weights.swapaxes(1, 2), group_sizes)
  return d_rows, weight_gradients(rows, d_out, group_sizes).astype(weights.dtype), None


_with_loops.defvjp(_forward, _backward)


def weight_gradients(
  rows: Float[Array, "N D"], d_out: Float[Array, "N F"], group_sizes: Int[Array, "E"]
) -> Float[Array, "E D F"]:
  """Returns for each expert the product of its transposed rows with their gradients, in float32.

  The rows of each expert are cut into chunks of a few static sizes (`size_classes`), and each size
  is a loop of plain matmuls.

  Args:
    rows: The rows, sorted by expert.
    d_out: The gradient of each row's result. Rows after the last group are not read.
    group_sizes: The number of rows of each expert.
  """
  chunks = layout(group_sizes, rows.shape[0], STEPS)
  first = jnp.cumsum(group_sizes) - group_sizes
  # The last chunk may extend beyond the last row.
  spare = ((0, chunks.classes[-1]), (0, 0))
  rows, d_out = jnp.pad(rows, spare), jnp.pad(d_out, spare)

  def add(total, e, start, size):
    """Adds the product of the chunk of expert `e` that starts at row `start`."""
    # A chunk may extend into rows of the next expert, and rows after the last group are undefined:
    # both are replaced, because 0 times NaN would be NaN.
    is_own = (start + jnp.arange(size) < first[e] + group_sizes[e])[:, None]
    own, d_own = (
      jnp.where(is_own, jax.lax.dynamic_slice_in_dim(array, start, size), 0)
      for array in (rows, d_out)
    )
    product = jax.lax.dot_general(
      own, d_own, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
    before = jax.lax.dynamic_index_in_dim(total, e, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(total, before + product, e, 0)

  # The buffer is made from the rows, so that under `jax.shard_map` it varies over the same mesh
  # axes as they do.
  shape = (group_sizes.shape[0], rows.shape[1], d_out.shape[1])
  total = jnp.zeros_like(rows, jnp.float32, shape)
  return _fold(chunks, first, add, total)


def _fold(chunks: Layout, first, add, total):
  """Calls `add(total, e, start, size)` for each chunk of each expert, one loop for each size."""
  for m, size in enumerate(chunks.classes):

    def expert(i, total, size=size):
      e = chunks.order[i]

      def chunk(c, total):
        return add(total, e, first[e] + c * size, size)

      with jax.named_scope(f"chunks_of_{size}"):
        return jax.lax.fori_loop(0, chunks.chunks[e], chunk, total)

    with jax.named_scope(f"experts_of_{size}"):
      total = jax.lax.fori_loop(chunks.bounds[m], chunks.bounds[m + 1], expert, total)
  return total
