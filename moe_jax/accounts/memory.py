"""The bytes that a training step keeps for its backward pass, from the shapes that JAX saves."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.assembly.experts import group_tokens
from moe_jax.assembly.models import FAMILIES, abstract_variables
from moe_jax.options import Config


def activation_bytes(config: Config, vocab_size: int, vocab_shards: int = 1) -> float:
  """Returns the bytes per row that `jax.vjp` of the loss saves, given model.remat.

  A row has data.seq_len tokens, and an encoder's input where there is an encoder. The loss is
  traced for batches of n and of 2n rows, and the results are subtracted. Weights, which are saved
  once, therefore do not count. n is the smallest number of rows that holds whole routing groups.

  This is an estimate. XLA merges and drops some of these arrays. Besides, a step needs memory for
  the layer that is being computed or recomputed, and for what the dispatcher sends.

  Args:
    config: A config with all sections.
    vocab_size: The size of the tokenizer's vocabulary, which counts if model.vocab_size is 0.
    vocab_shards: The number of devices that share the logits of a row.
  """
  size = group_tokens(config.model.moe, config.data.seq_len)
  rows = size // math.gcd(size, config.data.seq_len)
  return (
    _saved(config, vocab_size, 2 * rows, vocab_shards)
    - _saved(config, vocab_size, rows, vocab_shards)
  ) / rows


def _saved(config: Config, vocab_size: int, rows: int, vocab_shards: int) -> float:
  """Returns the bytes that the backward pass of a batch of `rows` rows saves, with the weights."""
  vocab_size = config.model.vocab_size or vocab_size
  model = FAMILIES[config.model.family](config.model, vocab_size, "gpu")

  def ids(length):
    return jax.ShapeDtypeStruct((rows, length), jnp.int32)

  encoder = {}
  if config.model.family == "encoder_decoder":
    encoder = {
      "encoder": dict.fromkeys(("tokens", "segment_ids", "positions"), ids(config.data.encoder_len))
    }

  def backward(variables, key, inputs, encoder):
    keys = {"dropout": key, "router": key}

    def loss(params):
      (nats, _), aux = model.apply(
        {**variables, "params": params},
        *inputs,
        train=True,
        rngs=keys,
        targets=inputs[0],
        **encoder,
      )
      return jnp.sum(nats), aux.losses

    # The function that `jax.vjp` returns is a pytree, whose leaves are the saved arrays.
    return jax.vjp(loss, variables["params"])[1]

  variables = nn.unbox(abstract_variables(config, vocab_size))
  saved = jax.tree.leaves(
    jax.eval_shape(backward, variables, jax.random.key(0), (ids(config.data.seq_len),) * 3, encoder)
  )
  # An array whose last axis has one of these sizes counts as logits.
  logits = {vocab_size, config.model.target_vocab_size or vocab_size}

  def shards(leaf):
    return vocab_shards if leaf.shape and leaf.shape[-1] in logits else 1

  return sum(leaf.size * leaf.dtype.itemsize / shards(leaf) for leaf in saved)
