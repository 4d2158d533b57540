"""Builds the model of a config."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import FrozenConfigDict

from moe_jax import data, sharding
from moe_jax.assembly.experts import (
  balancing_options,
  encoder_layers,
  encoder_model,
  group_tokens,
  has_experts,
  layer_kinds,
  moe_layer,
  routed_experts,
)
from moe_jax.assembly.sublayers import kind, layout, own_models
from moe_jax.data.options import DataOptions
from moe_jax.errors import ConfigError, choose
from moe_jax.layers import (
  NORMS,
  Attention,
  AttentionOptions,
  DenseFfn,
  LatentAttention,
  LatentOptions,
  Lstm,
  RopeOptions,
)
from moe_jax.layers.relative_bias import bias_table
from moe_jax.models import (
  EncoderDecoder,
  LanguageModel,
  Tower,
  lstm_block,
  sublayer_block,
  transformer_block,
)
from moe_jax.options import Config

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def model(config: Config, vocab_size: int, mesh: jax.sharding.Mesh) -> nn.Module:
  """Returns the model of a config.

  Args:
    config: A config that `validate` accepts.
    vocab_size: The number of ids in the data. If model.vocab_size is not 0, it is used instead.
    mesh: The mesh on which the model will run. Its platform chooses among implementations.

  Raises:
    ConfigError: If model.vocab_size or model.target_vocab_size is neither 0 nor at least
      `vocab_size`.
  """
  fixed = config.model.vocab_size
  if fixed and fixed < vocab_size:
    raise ConfigError(
      "model.vocab_size", fixed, f"the data hold {vocab_size} ids; use at least that, or 0"
    )
  target = config.model.target_vocab_size
  if 0 < target < vocab_size:
    raise ConfigError(
      "model.target_vocab_size", target, f"the data hold {vocab_size} ids; use at least that, or 0"
    )
  family = choose("model.family", config.model.family, FAMILIES)
  return family(config.model, fixed or vocab_size, sharding.platform(mesh)).clone(seed=config.seed)


def abstract_variables(config: Config, vocab_size: int) -> Any:
  """Returns the shapes of the variables of a config's model, in Flax's boxes.

  The model is traced once, and nothing is allocated. `vocab_size` is that of the data. If the
  config has one of its own, that is used instead.
  """
  one_group = group_tokens(config.model.moe, config.data.seq_len)
  return _abstract_variables(
    FrozenConfigDict(config.model), config.model.vocab_size or vocab_size, one_group
  )


@functools.lru_cache(maxsize=4)
def _abstract_variables(m: Config, vocab_size: int, tokens: int) -> Any:
  """Returns `abstract_variables` for a row of `tokens` tokens; all arguments are hashable."""
  module = FAMILIES[m.family](m, vocab_size, "cpu")
  ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

  def init(key, *inputs):
    return module.init(key, *inputs, train=False)

  return jax.eval_shape(init, jax.random.key(0), ids, ids, ids)


def fixed_vocab_size(config: Config) -> int:
  """Returns the size of the vocabulary if the config fixes it, or 0 if it is the tokenizer's."""
  return config.model.vocab_size


def vocab_size(config: Config) -> int:
  """Returns the number of token ids of a config.

  It is the config's own `model.vocab_size`, or else that of the tokenizer and the sentinels of span
  corruption. The tokenizer is read only in the second case.

  Raises:
    ConfigError: If the tokenizer is needed and cannot be read.
  """
  options = DataOptions.of(config.data)
  return fixed_vocab_size(config) or data.vocab_size(options, data.tokenizer_of(options))


def grouped_query(m: Config, platform: str, **common) -> functools.partial:
  """Returns a factory for `Attention`; `common` supplies the fields that the config does not."""
  return functools.partial(
    Attention,
    options=AttentionOptions.of(m),
    rope=RopeOptions.of(m.rope),
    block=m.attention_block,
    kernel=attention_kernel(m, platform),
    norm_eps=m.norm_eps,
    **common,
  )


def global_attention(m: Config, platform: str, **common) -> functools.partial | None:
  """Returns a factory for the attention of the layers of `global_every`, or None without any."""
  if not m.global_every:
    return None
  position = m.position if m.global_positions else "none"
  options = dataclasses.replace(AttentionOptions.of(m), sliding_window=0, position=position)
  return functools.partial(grouped_query(m, platform, **common), options=options)


def latent(m: Config, platform: str, **common) -> functools.partial:
  """Returns a factory for `LatentAttention`; `common` supplies what the config does not."""
  return functools.partial(
    LatentAttention,
    options=LatentOptions.of(m.latent),
    num_heads=m.num_heads,
    rope_theta=m.rope_theta,
    rope=RopeOptions.of(m.rope),
    block=m.attention_block,
    kernel=attention_kernel(m, platform),
    **common,
  )


def attention_kernel(m: Config, platform: str) -> Literal["blocks", "splash"]:
  """Returns what computes self-attention in long rows on devices of a platform."""
  return "splash" if platform == "tpu" and m.attention_kernel == "auto" else "blocks"


def norm(m: Config) -> functools.partial:
  """Returns a factory for the norm of config.model."""
  return functools.partial(NORMS[m.norm], epsilon=m.norm_eps)


def shared_table(m: Config) -> functools.partial | None:
  """Returns a factory for the table of relative biases that the layers of a stack share.

  None means that each layer has its own table, or that there are no relative biases.
  """
  if not m.relative_shared:
    return None
  return functools.partial(bias_table, num_heads=m.num_heads, num_buckets=m.relative_buckets)


ATTENTIONS = {"grouped_query": grouped_query, "latent": latent}


def _dense_ffn(m: Config, output_scale: float) -> functools.partial:
  """Returns a factory for the dense FFN of config.model."""
  return functools.partial(
    DenseFfn,
    d_ff=m.d_ff,
    activation=m.activation,
    ffn_bias=m.ffn_bias,
    biases=m.mlp_bias,
    output_scale=output_scale,
    dtype=DTYPES[m.dtype],
  )


def _of_every_family(m: Config) -> dict[str, Any]:
  """Returns the fields that all model classes have."""
  return dict(
    d_model=m.d_model,
    num_experts=routed_experts(m.moe),
    balancing_state=balancing_options(m).state,
    embed_scale=m.embed_scale,
    tied_embeddings=m.tied_embeddings,
    dtype=DTYPES[m.dtype],
    logits_chunk=m.logits_chunk,
    layer_reduce=m.moe.layer_reduce,
  )


def _transformer_block(
  m: Config, layers: Sequence[bool], scale: float, platform: str, **parts: Any
) -> functools.partial:
  """Returns a factory for the layers of a Transformer.

  Args:
    m: The section `model` of the config.
    layers: For each layer whether it has experts.
    scale: The scale of the initial output projections.
    platform: The platform of the devices that will run the model.
    **parts: Factories for attention, for that of global layers and, in a decoder that has an
      encoder, for cross-attention.
  """
  dense = _dense_ffn(m, scale)
  return functools.partial(
    transformer_block,
    dense=dense,
    moe=moe_layer(m, dense, platform) if any(layers) else None,
    hash_moe=moe_layer(m, dense, platform, by_hash=True) if m.moe.hash_layers else None,
    norm=norm(m),
    extra_ffn=m.moe.extra_ffn,
    dropout=m.dropout,
    remat=m.remat,
    **parts,
  )


def _decoder(m: Config, vocab_size: int, platform: str) -> LanguageModel:
  """Returns a decoder-only Transformer."""
  layers = has_experts(m)
  # Each addition to the residual stream starts with the variance 1 / additions, so that their sum
  # has the variance 1.
  additions = 2 * m.num_layers + m.moe.extra_ffn * sum(layers)
  scale = additions**-0.5
  common = {"output_scale": scale, "dtype": DTYPES[m.dtype]}
  attentions = {
    "attention": ATTENTIONS[m.attention](m, platform, **common),
    "global_attention": global_attention(m, platform, **common),
  }
  return LanguageModel(
    vocab_size=vocab_size,
    has_experts=layers,
    kinds=layer_kinds(m),
    gate_residual=m.moe.gate_residual,
    block=_transformer_block(m, layers, scale, platform, **attentions),
    final_norm=norm(m),
    bias_table=shared_table(m),
    dropout=m.dropout,
    scan_layers=m.scan_layers,
    **_of_every_family(m),
  )


def _encoder_decoder(m: Config, vocab_size: int, platform: str) -> EncoderDecoder:
  """Returns a Transformer with an encoder and a decoder."""
  layers, split = has_experts(m), encoder_layers(m)
  return EncoderDecoder(
    vocab_size=vocab_size,
    encoder_experts=layers[:split],
    decoder_experts=layers[split:],
    encoder=_tower(encoder_model(m), layers[:split], platform, encoder=True),
    decoder=_tower(m, layers[split:], platform, encoder=False),
    target_vocab_size=m.target_vocab_size,
    **_of_every_family(m),
  )


def _tower(m: Config, layers: tuple[bool, ...], platform: str, encoder: bool) -> functools.partial:
  """Returns a factory for an encoder or a decoder of these layers.

  As in T5 and GShard, attention weights have dropout, too.
  """
  additions = (2 if encoder else 3) * len(layers) + m.moe.extra_ffn * sum(layers)
  scale = additions**-0.5
  attention = grouped_query(
    m, platform, causal=not encoder, dropout=m.dropout, output_scale=scale, dtype=DTYPES[m.dtype]
  )
  without_positions = dataclasses.replace(AttentionOptions.of(m), position="none")
  cross = None if encoder else functools.partial(attention, options=without_positions)
  return functools.partial(
    Tower,
    block=_transformer_block(m, layers, scale, platform, attention=attention, cross=cross),
    norm=norm(m),
    bias_table=shared_table(m),
    dropout=m.dropout,
    scan_layers=m.scan_layers,
  )


def _lstm(m: Config, vocab_size: int, platform: str) -> LanguageModel:
  """Returns a language model of LSTM layers, some of which have experts."""
  layers, dtype = has_experts(m), DTYPES[m.dtype]
  # The experts' output passes through a sigmoid, whose output no scale of initialisation keeps
  # small. The factory is needed for shared experts.
  dense = _dense_ffn(m, 1.0)
  units = m.lstm_units or m.d_model
  lstm = functools.partial(
    Lstm, units=units, projected=0 if units == m.d_model else m.d_model, dtype=dtype
  )
  moe = moe_layer(m, dense, platform) if any(layers) else None
  block: Any = functools.partial(lstm_block, lstm=lstm, moe=moe, dropout=m.dropout, remat=m.remat)
  return LanguageModel(
    vocab_size=vocab_size,
    has_experts=layers,
    block=block,
    dropout=m.dropout,
    scan_layers=m.scan_layers,
    **_of_every_family(m),
  )


def _brainformer(m: Config, vocab_size: int, platform: str) -> LanguageModel:
  """Returns a Brainformer, whose layers are the sublayers of model.block."""
  entries, dtype = layout(m), DTYPES[m.dtype]
  scale = len(entries) ** -0.5

  def sublayer(entry: str, entry_model: Config) -> dict[str, Any]:
    dense = _dense_ffn(entry_model, scale)
    make = {
      "attention": lambda: grouped_query(entry_model, platform, output_scale=scale, dtype=dtype),
      "ffn": lambda: dense,
      "moe": lambda: moe_layer(entry_model, dense, platform),
    }[kind(entry)]
    return {"layer": make(), "attends": kind(entry) == "attention", "width": entry_model.d_model}

  sublayers = {entry: sublayer(entry, entry_model) for entry, entry_model in own_models(m).items()}
  block: Any = functools.partial(
    sublayer_block, sublayers=sublayers, norm=norm(m), dropout=m.dropout, dtype=dtype, remat=m.remat
  )
  return LanguageModel(
    vocab_size=vocab_size,
    has_experts=has_experts(m),
    block=block,
    kinds=entries,
    final_norm=norm(m),
    dropout=m.dropout,
    scan_layers=m.scan_layers,
    **_of_every_family(m),
  )


# For each value of model.family, a function (m, vocab_size, platform) -> model.
FAMILIES = {
  "decoder": _decoder,
  "encoder_decoder": _encoder_decoder,
  "brainformer": _brainformer,
  "lstm": _lstm,
}
