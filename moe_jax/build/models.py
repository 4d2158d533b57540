"""The model of a config."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from moe_jax import sharding
from moe_jax.build.experts import has_experts, moe_layer
from moe_jax.errors import ConfigError, choose
from moe_jax.layers import NORMS, Attention, DenseFfn
from moe_jax.models import Decoder

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def model(config: ConfigDict, vocab_size: int, mesh: jax.sharding.Mesh) -> nn.Module:
  """The model of a config that `validate` accepts.

  Args:
    config: as of configs/base.py.
    vocab_size: the tokenizer's size; model.vocab_size, unless 0, must be at least that, and is used instead.
    mesh: where the model will run; its platform chooses among implementations.
  """
  wanted = config.model.vocab_size
  if wanted and wanted < vocab_size:
    raise ConfigError("model.vocab_size", wanted, f"the tokenizer has {vocab_size} ids; use at least that, or 0")
  family = choose("model.family", config.model.family, FAMILIES)
  return family(config.model, wanted or vocab_size, sharding.platform(mesh))


def _decoder(m: ConfigDict, vocab_size: int, platform: str) -> Decoder:
  dtype, scale = DTYPES[m.dtype], (2 * m.num_layers) ** -0.5  # each layer adds twice to the residual stream
  layers = has_experts(m)
  dense = functools.partial(DenseFfn, d_ff=m.d_ff, activation=m.activation, output_scale=scale, dtype=dtype)
  biased = any(layers) and m.moe.bias_update_rate
  return Decoder(
      vocab_size=vocab_size, d_model=m.d_model, has_experts=layers,
      attention=functools.partial(Attention, num_heads=m.num_heads, num_kv_heads=m.num_kv_heads, head_dim=m.head_dim,
                                  rope_theta=m.rope_theta, output_scale=scale, dtype=dtype),
      dense=dense, moe=moe_layer(m, dense, platform) if any(layers) else None, norm=NORMS[m.norm],
      num_biased_experts=m.moe.num_experts if biased else 0, tied_embeddings=m.tied_embeddings, dropout=m.dropout,
      dtype=dtype, scan_layers=m.scan_layers, remat=m.remat, layer_reduce=m.moe.layer_reduce)


FAMILIES = {"decoder": _decoder}
