"""Parameters and FLOPs of a config, from the shapes of the real model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from moe_jax.build.experts import experts_a_token
from moe_jax.build.models import FAMILIES


def parameter_counts(config: ConfigDict, vocab_size: int) -> tuple[int, int]:
  """(total, activated) parameters, by `jax.eval_shape` of the real model; activated: those that one token meets.

  Of E experts a token meets A/S: K for token choice, the capacity factor on average for expert choice. The embedding
  counts in full in both.
  """
  total = activated = 0
  for leaf in _parameters(config, vocab_size):
    total += leaf.value.size
    activated += leaf.value.size * (experts_a_token(config.model, config.data.seq_len) / config.model.moe.num_experts
                                    if "expert" in leaf.names else 1)
  return total, round(activated)


def flops_per_token(config: ConfigDict, vocab_size: int) -> float:
  """FLOPs of the forward pass's matmuls a token: 2 a weight that the token meets, and 4 L H P a layer for attention.

  Attention is counted as computed, over all L positions. Not counted: the embedding look-up, dispatch, norms,
  softmaxes. Training costs about three times this.
  """
  m = config.model
  _, activated = parameter_counts(config, vocab_size)
  vectors = sum(leaf.value.size for leaf in _parameters(config, vocab_size) if set(leaf.names) <= {"norm", "layers"})
  lookup = 0 if m.tied_embeddings else (m.vocab_size or vocab_size) * m.d_model
  attention = 4 * m.num_layers * config.data.seq_len * m.num_heads * m.head_dim
  return float(2 * (activated - vectors - lookup) + attention)


def _parameters(config: ConfigDict, vocab_size: int) -> list[nn.LogicallyPartitioned]:
  built = FAMILIES[config.model.family](config.model, config.model.vocab_size or vocab_size, "cpu")
  tokens = jax.ShapeDtypeStruct((1, config.data.seq_len), jnp.int32)
  init = lambda key, *args: built.init(key, *args, train=False)["params"]
  return jax.tree.leaves(jax.eval_shape(init, jax.random.key(0), tokens, tokens, tokens),
                         is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
