"""Gradient accumulation: the gradients, losses and metrics of a batch from those of its
microbatches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from moe_jax.layers import Microbatch
from moe_jax.routing import metrics

# inputs, targets, segment_ids, positions: Int[B, L]; segment 0 is padding. For an encoder-decoder
# also encoder_tokens, encoder_segment_ids, encoder_positions: Int[B, M].
Batch = dict[str, Array | np.ndarray]


def accumulate(
  grad_of: Callable,
  shares_of: Callable,
  params: PyTree,
  batch: Batch,
  key: Key[Array, ""],
  steps: int,
) -> tuple[PyTree, dict[str, Array], dict[str, Array]]:
  """Gradients, losses and `routing.metrics.sums` of a batch, one microbatch of it at a time.

  They do not depend on `steps`, up to float32's rounding, wherever routing groups lie within rows
  and no slot runs out: each microbatch divides by what the whole batch holds (real tokens), routing
  noise belongs to the row (`Microbatch`), and metrics are made of sums. Dropout alone is drawn anew
  for each microbatch, from keys that depend on `steps`.

  A balance loss over the whole batch (`balance_over="global"`, arXiv 2501.11873) needs f of all
  microbatches before the gradient of the first. Where a layer has such a loss and steps > 1, a
  first pass over the microbatches, forward only and without the output layer, adds up f; it costs
  up to one more forward pass, about a third of the step, and no memory. f has no gradient, so that
  the gradients of the second pass add up to that of the whole batch's loss. All other losses are
  means over groups, for which one pass suffices.

  Args:
    grad_of: (params, rows, rngs, micro) -> (gradients, (losses, sums)); micro is None where `steps`
      is 1.
    shares_of: (params, rows, rngs, micro) -> `Aux.shares`, by a forward pass; {} where no loss
      needs it.
    params: the model's weights.
    batch: all rows.
    key: of this update.
    steps: microbatches; divides B.
  """
  if steps == 1:
    grads, (losses, sums) = grad_of(params, batch, _rngs(key, key), None)
    return grads, losses, sums
  # Microbatch m takes rows m, m + steps, ...: each device keeps its own rows.
  cut = (
    jax.tree.map(lambda x: x.reshape(-1, steps, *x.shape[1:]).swapaxes(0, 1), batch),
    jnp.arange(steps),
  )
  real = {
    name: jnp.sum(batch[name] > 0, dtype=jnp.float32)
    for name in batch
    if name.endswith("segment_ids")
  }

  def part(xs: tuple[Batch, Array], shares: dict[str, Array]) -> tuple[Any, ...]:
    rows, m = xs
    micro = Microbatch(m, real["segment_ids"], real.get("encoder_segment_ids"), shares, steps)
    return rows, _rngs(jax.random.fold_in(key, m + 2), key), micro

  def of_part(xs):
    return shares_of(params, *part(xs, {}))

  shares = jax.eval_shape(
    of_part, jax.tree.map(lambda x: x[0], cut)
  )  # asks which there are, and computes nothing
  if shares:
    zeros = jax.tree.map(jnp.zeros_like, shares)
    shares, _ = jax.lax.scan(
      lambda total, xs: (jax.tree.map(jnp.add, total, of_part(xs)), None), zeros, cut
    )

  def one(total, xs):
    grads, (losses, sums) = grad_of(params, *part(xs, shares))
    return jax.tree.map(jnp.add, total, grads), (losses, sums)

  grads, (losses, sums) = jax.lax.scan(one, jax.tree.map(jnp.zeros_like, params), cut)
  return grads, jax.tree.map(lambda x: jnp.sum(x, axis=0), losses), metrics.combine(sums)


def _rngs(own: Key[Array, ""], shared: Key[Array, ""]) -> dict[str, Key[Array, ""]]:
  """Dropout by the microbatch's own key, routing noise by the batch's."""
  return {"dropout": jax.random.fold_in(own, 0), "router": jax.random.fold_in(shared, 1)}
