"""The bytes that layers with experts exchange, by a formula to which a program is compared."""

from __future__ import annotations

import jax.numpy as jnp

from moe_jax.assembly.experts import (
  capacity_options,
  encoder_layers,
  group_tokens,
  has_experts,
  layers_with_experts,
  router_of,
  trace_router,
)
from moe_jax.assembly.models import DTYPES
from moe_jax.options import Config


def exchange_bytes(config: Config) -> float:
  """Returns the bytes that one training step sends to experts and back, per row of the batch.

  The result is the sum over all layers, as if no expert were on the token's own device. If n
  devices share the experts, a device keeps 1/n of these bytes.

  A layer sends vectors of width D, or of `latent_width`, twice in the forward pass (to the experts
  and back) and twice in the backward pass, and twice more if it is recomputed (model.remat). There
  is one vector per slot, whether it is filled or not, or one per assignment if nothing is dropped.
  The [E, C, D] slots per group of S tokens are what GShard's AllToAll carries (arXiv 2006.16668,
  Sec. 3.3). On TPUs the dispatcher `scatter` sends vectors twice more in the backward pass.
  """
  m, length = config.model, config.data.seq_len
  encoder_layers_with_experts = sum(has_experts(m)[: encoder_layers(m)])
  # The number of values that go in one direction, once.
  values = 0.0
  for i, layer_model in enumerate(layers_with_experts(m)):
    tokens = config.data.encoder_len if i < encoder_layers_with_experts else length
    width = layer_model.moe.latent_width or layer_model.d_model
    values += tokens * rows_a_token(layer_model, tokens) * width
  times = 4 if m.remat in ("none", "exchanges", "experts") else 6
  return times * values * jnp.dtype(DTYPES[m.dtype]).itemsize


def rows_a_token(m: Config, seq_len: int) -> float:
  """Returns the number of vectors that are sent per token in training.

  It is E*C/S (slots), or A/S (assignments) if nothing is dropped. The latter is an upper bound with
  zero-computation experts, to which nothing is sent.

  Args:
    m: The section `model` of the config, as a layer reads it.
    seq_len: The tokens per row, which may be the size S of a group and thus affect how the number
      of slots is rounded.
  """
  e, size = m.moe, group_tokens(m.moe, seq_len)
  if e.soft_slots:
    return e.num_experts * e.soft_slots / size
  assignments = trace_router(e, size).expert.shape[-1]
  capacity = capacity_options(e, router_of(e))
  slots = capacity.slots(size, e.num_experts, assignments, train=True)
  return assignments / size if slots is None else e.num_experts * slots / size
