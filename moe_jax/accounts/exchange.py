"""What layers with experts send and receive, by the formula: the number that a compiled program is
compared with."""

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
  """Bytes a row of the batch that go to experts and back in one training step, in all layers, if
  none stays at home.

  A layer sends its rows of width D twice forward (to the experts and back) and twice backward, and
  twice more where it is recomputed (model.remat). There is one row a slot, filled or not, or one an
  assignment where nothing is dropped; [E, C, D] slots a group of S tokens are what GShard's
  AllToAll carries (arXiv 2006.16668, Sec. 3.3). Of these bytes a device keeps 1/n where n devices
  share the experts. On TPUs the dispatcher `scatter` sends rows twice more backward.
  """
  m, length = config.model, config.data.seq_len
  of_encoder = sum(has_experts(m)[: encoder_layers(m)])
  values = 0.0  # that go one way, once
  for i, own in enumerate(layers_with_experts(m)):
    tokens = config.data.encoder_len if i < of_encoder else length
    values += tokens * rows_a_token(own, tokens) * own.d_model
  return (4 if m.remat == "none" else 6) * values * jnp.dtype(DTYPES[m.dtype]).itemsize


def rows_a_token(m: Config, seq_len: int) -> float:
  """Rows that travel for each token in training: E*C/S slots, or A/S assignments where nothing is
  dropped.

  Of rows of `seq_len` tokens, whose number may decide how E*C/S is rounded.
  """
  e, size = m.moe, group_tokens(m.moe, seq_len)
  if e.soft_slots:
    return e.num_experts * e.soft_slots / size
  assignments = trace_router(e, size).expert.shape[-1]
  capacity = capacity_options(e, router_of(e))
  slots = capacity.slots(size, e.num_experts, assignments, train=True)
  return assignments / size if slots is None else e.num_experts * slots / size
