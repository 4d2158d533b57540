"""Computes what a step should need by arithmetic on shapes: memory, FLOPs and bytes exchanged.

A dry run shows these figures beside the compiler's.
"""

from __future__ import annotations

import math
from typing import Any

import jax

from moe_jax import accounts, sharding
from moe_jax.training.state import TrainState

KINDS = ("weights", "gradients", "optimizer state", "activations")


def memory(config, state: TrainState, vocab_size: int, mesh: Any) -> dict[str, float]:
  """Returns the bytes of each of `KINDS` on one device.

  Gradients are as large as the weights and have the same layout. Activations are what is saved for
  the backward pass (`accounts.activation_bytes`), for the rows of a microbatch that a device holds.
  With tensor > 1 this counts too much if heads or hidden units are saved.

  Args:
    config: The config, of which the model, the batch and `remat` matter.
    state: The abstract training state, whose leaves have shardings.
    vocab_size: The number of ids in the data.
    mesh: The mesh of these shardings.
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
  """Returns the bytes that the arrays of a tree occupy on one device; they may be abstract."""
  return float(
    sum(
      math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
      for leaf in jax.tree.leaves(tree)
    )
  )


def batch_shards(sizes: dict[str, int]) -> int:
  """Returns the number of parts into which a mesh of these sizes splits the rows of a batch."""
  return math.prod(sizes.get(axis, 1) for axis in sharding.RULES["batch"])


def step_flops(config, vocab_size: int) -> float:
  """Returns the FLOPs that a step needs on all devices together.

  They are those of the matmuls of 3 forward passes, without dispatch or recomputation.
  """
  return 3.0 * accounts.flops_per_token(config, vocab_size) * step_tokens(config)


def step_tokens(config) -> int:
  """Returns the tokens of a step; for an encoder-decoder these are the decoder's."""
  return config.train.batch_size * config.data.seq_len


def exchange(config, sizes: dict[str, int]) -> float:
  """Returns the bytes that a device exchanges in a step with experts on other devices.

  It follows the formula of `accounts.exchange_bytes`, which counts the way to the experts and back,
  forward and backward.

  Args:
    config: The config.
    sizes: Mesh axis name to size.
  """
  parts = sizes["expert"]
  # A device keeps the share of the rows that goes to its own experts.
  away = (parts - 1) / parts
  return away * accounts.exchange_bytes(config) * config.train.batch_size / batch_shards(sizes)
