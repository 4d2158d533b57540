"""Gradient accumulation, which computes the gradients of a batch from those of its microbatches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from moe_jax.layers import Microbatch
from moe_jax.routing import metrics

# A batch has the entries inputs, targets, segment_ids and positions, each Int[B, L]. Segment 0 is
# padding. Batches of an encoder-decoder also have encoder_tokens, encoder_segment_ids and
# encoder_positions, each Int[B, M].
Batch = dict[str, Array | np.ndarray]


def accumulate(
  grad_of: Callable,
  shares_of: Callable,
  params: PyTree,
  batch: Batch,
  key: Key[Array, ""],
  steps: int,
) -> tuple[PyTree, dict[str, Array], dict[str, Array]]:
  """Computes a batch's gradients, losses and routing sums, one microbatch at a time.

  Up to float32's rounding the result does not depend on `steps`, provided that routing groups lie
  within rows and no expert runs out of slots. Each microbatch divides by the number of real tokens
  of the whole batch, routing noise belongs to the row (`Microbatch`), and metrics are made of sums.
  Only dropout is drawn anew for each microbatch, from keys that depend on `steps`.

  A balance loss over the whole batch (`balance_over="global"`, arXiv 2501.11873) needs the load
  shares f of all microbatches before the gradient of the first. If a layer has such a loss and
  steps > 1, a first pass over the microbatches adds up f. That pass runs forward only and without
  the output layer. It costs up to one more forward pass, which is about a third of the step, and no
  memory. f has no gradient, so the gradients of the second pass add up to that of the whole batch's
  loss. All other losses are means over groups, for which one pass suffices.

  Args:
    grad_of: A function (params, rows, rngs, micro) -> (gradients, (losses, sums)). micro is None
      if `steps` is 1.
    shares_of: A function (params, rows, rngs, micro) -> `Aux.shares`, which runs a forward pass. It
      returns {} if no loss needs the shares.
    params: The model's weights.
    batch: All rows of the batch.
    key: The key of this update.
    steps: The number of microbatches, which must divide B.

  Returns:
    The gradients; the losses by name; and the batch's `routing.metrics.sums`.
  """
  if steps == 1:
    grads, (losses, sums) = grad_of(params, batch, _rngs(key, key), None)
    return grads, losses, sums
  # Microbatch m takes the rows m, m + steps, ..., so that each device keeps its own rows.
  cut = (
    jax.tree.map(lambda x: x.reshape(-1, steps, *x.shape[1:]).swapaxes(0, 1), batch),
    jnp.arange(steps),
  )
  # The numbers of real tokens in the whole batch, by which every microbatch divides.
  real = {
    name: jnp.sum(batch[name] > 0, dtype=jnp.float32)
    for name in batch
    if name.endswith("segment_ids")
  }

  def arguments(xs: tuple[Batch, Array], shares: dict[str, Array]) -> tuple[Any, ...]:
    rows, m = xs
    micro = Microbatch(m, real["segment_ids"], real.get("encoder_segment_ids"), shares, steps)
    # `_rngs` folds 0 and 1 into a key, so m + 2 keeps the microbatches' keys apart from those.
    return rows, _rngs(jax.random.fold_in(key, m + 2), key), micro

  def microbatch_shares(xs):
    return shares_of(params, *arguments(xs, {}))

  # Tracing tells which shares there are, without any computation.
  shares = jax.eval_shape(microbatch_shares, jax.tree.map(lambda x: x[0], cut))
  if shares:
    zeros = jax.tree.map(jnp.zeros_like, shares)
    shares, _ = jax.lax.scan(
      lambda total, xs: (jax.tree.map(jnp.add, total, microbatch_shares(xs)), None), zeros, cut
    )

  def add_gradients(total, xs):
    grads, (losses, sums) = grad_of(params, *arguments(xs, shares))
    return jax.tree.map(jnp.add, total, grads), (losses, sums)

  grads, (losses, sums) = jax.lax.scan(add_gradients, jax.tree.map(jnp.zeros_like, params), cut)
  return grads, jax.tree.map(lambda x: jnp.sum(x, axis=0), losses), metrics.combine(sums)


def _rngs(micro_key: Key[Array, ""], batch_key: Key[Array, ""]) -> dict[str, Key[Array, ""]]:
  """Returns the keys of Flax: dropout uses the microbatch's own key, routing noise the batch's."""
  return {"dropout": jax.random.fold_in(micro_key, 0), "router": jax.random.fold_in(batch_key, 1)}
