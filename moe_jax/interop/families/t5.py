"""T5 and T5 1.1 (arXiv 1910.10683): an encoder-decoder with relative biases, without experts.

`tie_word_embeddings` says whether the embedding is also the output projection, whose input is then
divided by sqrt(D). Transformers 5 writes it as True always, and `scale_decoder_outputs` in its
place; T5 1.1 has a projection of its own.
"""

from __future__ import annotations

from typing import Any

from moe_jax.interop.rows import SAME, TRANSPOSE, Row, heads_in, heads_out
from moe_jax.interop.settings import Settings, read_pairs, write_pairs
from moe_jax.options import Config

MODEL_TYPE = "t5"
ARCHITECTURE = "T5ForConditionalGeneration"
# Names by which older releases are called.
OTHER_NAMES = ("T5WithLMHeadModel",)
PRESET = ""
# Copies of the embedding that both stacks hold, and the bias of cross-attention that an old version
# saved and nothing reads.
IGNORED = (
  r"(encoder|decoder)\.embed_tokens\.weight",
  r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
)
# `feed_forward_proj` -> `model.activation`. GELU is that of the tanh form, for which T5 1.1's
# "gated-gelu" stands.
ACTIVATIONS = {
  "relu": "relu",
  "gelu_new": "gelu",
  "gated-gelu": "geglu",
  "gated-relu": "reglu",
  "gated-silu": "swiglu",
}
_SIZES = {"d_model": "d_model", "d_ff": "d_ff", "d_kv": "head_dim", "num_heads": "num_heads"}
_SIZES |= {"vocab_size": "vocab_size"}


def keys(s: Settings) -> dict[str, Any]:
  """Returns the dotted keys of our config, with the values that a config.json gives them."""
  name = s.must("feed_forward_proj", "relu", *ACTIVATIONS)
  # These follow from it.
  s.ignore("dense_act_fn", "is_gated_act")
  tied = s.take("tie_word_embeddings", True) and s.take("scale_decoder_outputs", True)
  s.ignore("scale_decoder_outputs")
  return common_keys(s) | {
    "model.tied_embeddings": tied,
    "model.activation": ACTIVATIONS[name],
    "model.moe.num_experts": 0,
  }


def common_keys(s: Settings) -> dict[str, Any]:
  """Returns the keys that T5 and Switch share, without the FFN."""
  s.ignore("is_decoder", "is_encoder_decoder")
  layers = s.take("num_layers")
  decoder_layers = s.take("num_decoder_layers", layers)
  return read_pairs(s, _SIZES) | {
    "model.family": "encoder_decoder",
    "model.attention": "grouped_query",
    "model.num_kv_heads": s.take("num_heads"),
    "model.num_layers": decoder_layers,
    # 0 means as many as the decoder has.
    "model.num_encoder_layers": 0 if layers == decoder_layers else layers,
    "model.qkv_bias": False,
    "model.output_bias": False,
    "model.mlp_bias": False,
    "model.qk_norm": False,
    "model.clip_qkv": 0.0,
    "model.sliding_window": 0,
    "model.query_scale": 1.0,
    "model.position": "relative",
    "model.relative_shared": True,
    "model.relative_buckets": s.take("relative_attention_num_buckets", 32),
    "model.relative_max_distance": s.take("relative_attention_max_distance", 128),
    "model.norm": "rmsnorm",
    "model.norm_eps": s.take("layer_norm_epsilon", 1e-6),
    "model.embed_scale": False,
  }


def settings(m: Config) -> dict[str, Any]:
  """Returns the settings of a config.json for the section `model`; the inverse of `keys`."""
  names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
  return common_settings(m) | {
    "feed_forward_proj": names[m.activation],
    "tie_word_embeddings": m.tied_embeddings,
  }


def common_settings(m: Config) -> dict[str, Any]:
  """Returns the settings of `common_keys`."""
  return write_pairs(m, _SIZES) | {
    "is_encoder_decoder": True,
    "num_layers": m.num_encoder_layers or m.num_layers,
    "num_decoder_layers": m.num_layers,
    "layer_norm_epsilon": m.norm_eps,
    "relative_attention_num_buckets": m.relative_buckets,
    "relative_attention_max_distance": m.relative_max_distance,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
  }


def rows(m: Config, fused: bool) -> list[Row]:
  """Returns which published tensor is which parameter of ours, see `rows.Row`."""
  ffn = []
  for stack, place in FFNS.items():
    for theirs, ours in matrices(m.activation).items():
      name = f"{place}DenseReluDense.{theirs}.weight"
      ffn.append(Row(name, f"{stack}/layer_{{l}}/ffn/{ours}", TRANSPOSE))
  return outer_rows(m) + ffn


# Stack -> where its FFNs are.
FFNS = {"encoder": "encoder.block.{l}.layer.1.", "decoder": "decoder.block.{l}.layer.2."}


def matrices(activation: str) -> dict[str, str]:
  """Returns the names of the matrices of an FFN, theirs -> ours."""
  if activation.endswith("glu"):
    return {"wi_0": "gate", "wi_1": "up", "wo": "down"}
  return {"wi": "up", "wo": "down"}


def outer_rows(m: Config) -> list[Row]:
  """Returns the rows of everything but the FFNs."""
  rows = [Row("shared.weight", "embedding", SAME)]
  if not m.tied_embeddings:
    rows.append(Row("lm_head.weight", "head", TRANSPOSE))
  for stack, ffn in FFNS.items():
    block, ours = f"{stack}.block.{{l}}.layer.", f"{stack}/layer_{{l}}/"
    table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    rows += [
      Row(f"{stack}.final_layer_norm.weight", f"{stack}/final_norm/scale", SAME),
      Row(table, f"{stack}/relative_bias", TRANSPOSE),
      Row(f"{block}0.layer_norm.weight", f"{ours}attention_norm/scale", SAME),
      Row(f"{ffn}layer_norm.weight", f"{ours}ffn_norm/scale", SAME),
      *attention_rows(m, f"{block}0.SelfAttention.", f"{ours}attention/"),
    ]
  cross, ours = "decoder.block.{l}.layer.1.", "decoder/layer_{l}/cross_attention"
  return [
    *rows,
    Row(f"{cross}layer_norm.weight", f"{ours}_norm/scale", SAME),
    *attention_rows(m, f"{cross}EncDecAttention.", f"{ours}/"),
  ]


def attention_rows(m: Config, theirs: str, ours: str) -> list[Row]:
  """Returns the rows of one attention."""
  names = {"q": "query", "k": "key", "v": "value"}
  rows = [
    Row(f"{theirs}{letter}.weight", ours + name, heads_in(m.num_heads))
    for letter, name in names.items()
  ]
  return [*rows, Row(f"{theirs}o.weight", f"{ours}output", heads_out(m.num_heads))]
