"""What a step should need by arithmetic on shapes: memory by kind and FLOPs, to stand beside the
compiler's."""

from __future__ import annotations

import math
from typing import Any

import jax

from moe_jax import accounts, sharding
from moe_jax.training.state import TrainState

KINDS = ("weights", "gradients", "optimizer state", "activations")


def memory(config, state: TrainState, vocab_size: int, mesh: Any) -> dict[str, float]:
  """Bytes a device of each of `KINDS`.

  Gradients are as large as the weights and lie like them. Activations are what the backward pass
  finds saved (`accounts.activation_bytes`), of the rows of a microbatch that a device holds; with
  tensor > 1 that is too much where heads or hidden units are saved.

  Args:
    config: whose model, batch and remat count.
    state: abstract, with shardings.
    vocab_size: ids of the data.
    mesh: of those shardings.
  """
  weights = held(state.params)
  sizes = dict(mesh.shape)
  rows = config.train.batch_size / config.train.accumulate_steps / batch_shards(sizes)
  activations = rows * accounts.activation_bytes(config, vocab_size, sizes["tensor"])
  return {
    "weights": weights,
    "gradients": weights,
    "optimizer state": held(state.opt_state),
    "activations": activations,
  }


def held(tree: Any) -> float:
  """Bytes of these abstract arrays on one device."""
  return float(
    sum(
      math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
      for leaf in jax.tree.leaves(tree)
    )
  )


def batch_shards(sizes: dict[str, int]) -> int:
  """Into how many parts a mesh of these sizes splits the rows of a batch."""
  return math.prod(sizes.get(axis, 1) for axis in sharding.RULES["batch"])


def step_flops(config, vocab_size: int) -> float:
  """FLOPs that a step needs, of all devices: 3 forward passes' worth of matmuls, without dispatch
  or recomputation."""
  return 3.0 * accounts.flops_per_token(config, vocab_size) * step_tokens(config)


def step_tokens(config) -> int:
  """Tokens a step: of the decoder, where there is an encoder, too."""
  return config.train.batch_size * config.data.seq_len


def exchange(config, sizes: dict[str, int]) -> float:
  """Bytes that a device sends to experts elsewhere and back in one step, by the formula
  (`accounts.exchange_bytes`)."""
  parts = sizes["expert"]
  away = (parts - 1) / parts
  return away * accounts.exchange_bytes(config) * config.train.batch_size / batch_shards(sizes)
