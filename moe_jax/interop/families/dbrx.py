"""DBRX (Databricks 2024): LayerNorm, clipped queries, keys and values, and 16 experts, top-4.

The released file has the base of the rotary embedding in `attn_config`. Transformers 5.24 ignores
it there and computes with `rope_parameters`, so that a file in which both stand and differ is
refused.
"""

from __future__ import annotations

from typing import Any

from moe_jax.interop.families import common
from moe_jax.interop.rows import SAME, TRANSPOSE, Row, experts_flat, heads_in, heads_out, parts
from moe_jax.interop.settings import Settings, read_pairs, write_pairs
from moe_jax.options import Config

MODEL_TYPE = "dbrx"
ARCHITECTURE = "DbrxForCausalLM"
PRESET = "dbrx"
IGNORED = common.IGNORED
LAYER = "transformer.blocks.{l}."
_SIZES = {"d_model": "d_model", "n_layers": "num_layers", "n_heads": "num_heads"}
_SIZES |= {"vocab_size": "vocab_size"}


def keys(s: Settings) -> dict[str, Any]:
  """Returns the dotted keys of our config, with the values that a config.json gives them."""
  attention, ffn = s.section("attn_config"), s.section("ffn_config")
  activation = ffn.section("ffn_act_fn")
  activation.must("name", "silu")
  # Jitter and the weight of the loss matter in training only.
  ffn.ignore("moe_jitter_eps", "moe_loss_weight", "hidden_size", "uniform_expert_assignment")
  ffn.must("moe_normalize_expert_weights", 1.0)
  heads = s.take("n_heads")
  kv_heads = attention.take("kv_n_heads", 1)
  s.ignore("num_key_value_heads")
  theta = attention.take("rope_theta", 10_000.0)
  rope = common.rope_keys(s)
  if s.take("rope_parameters", None) and rope["model.rope_theta"] != theta:
    s.problem(f"attn_config.rope_theta={theta} and that of rope_parameters differ")
  sizes = read_pairs(s, _SIZES)
  width = ffn.take("ffn_hidden_size")
  return (
    sizes
    | rope
    | common.routing_keys(ffn.take("moe_top_k"), norm=True)
    | {
      "model.family": "decoder",
      "model.attention": "grouped_query",
      "model.position": "rope",
      "model.rope_theta": float(theta),
      "model.num_kv_heads": kv_heads,
      "model.head_dim": sizes["model.d_model"] // heads,
      "model.qkv_bias": False,
      "model.output_bias": False,
      "model.mlp_bias": False,
      "model.qk_norm": False,
      "model.clip_qkv": float(attention.take("clip_qkv", 0.0)),
      "model.sliding_window": 0,
      "model.query_scale": 0.0,
      "model.activation": "swiglu",
      "model.norm": "layernorm",
      # The default of PyTorch's LayerNorm.
      "model.norm_eps": 1e-5,
      "model.embed_scale": False,
      "model.tied_embeddings": s.take("tie_word_embeddings", False),
      "model.d_ff": width,
      "model.moe.d_ff": width,
      "model.moe.num_experts": ffn.take("moe_num_experts"),
      "model.moe.first": 0,
      "model.moe.every": 1,
    }
  )


def settings(m: Config) -> dict[str, Any]:
  """Returns the settings of a config.json for the section `model`; the inverse of `keys`."""
  attention = {
    "clip_qkv": m.clip_qkv or None,
    "kv_n_heads": m.num_kv_heads,
    "rope_theta": m.rope_theta,
  }
  ffn = {
    "ffn_hidden_size": m.moe.d_ff,
    "hidden_size": m.d_model,
    "moe_num_experts": m.moe.num_experts,
    "moe_top_k": m.moe.router.top_k.k,
  }
  return (
    write_pairs(m, _SIZES)
    | common.rope_settings(m)
    | {
      "attn_config": attention,
      "ffn_config": ffn,
      "rope_parameters": {"rope_type": "default", "rope_theta": m.rope_theta},
      "tie_word_embeddings": m.tied_embeddings,
    }
  )


def rows(m: Config, fused: bool) -> list[Row]:
  """Returns which published tensor is which parameter of ours, see `rows.Row`."""
  place, ours = LAYER + "norm_attn_norm.", "layer_{l}/attention/"
  heads = (m.num_heads, m.num_kv_heads, m.num_kv_heads)
  qkv = (f"{ours}query", f"{ours}key", f"{ours}value")
  mlp, e = LAYER + "ffn.experts.mlp.", m.moe.num_experts
  head = [] if m.tied_embeddings else [Row("lm_head.weight", "head", TRANSPOSE)]
  return head + [
    Row("transformer.wte.weight", "embedding", SAME),
    Row("transformer.norm_f.weight", "final_norm/scale", SAME),
    Row(f"{place}norm_1.weight", "layer_{l}/attention_norm/scale", SAME),
    Row(f"{place}norm_2.weight", "layer_{l}/ffn_norm/scale", SAME),
    Row(f"{place}attn.Wqkv.weight", qkv, parts(heads_in(sum(heads)), heads, -2)),
    Row(f"{place}attn.out_proj.weight", f"{ours}output", heads_out(m.num_heads)),
    Row(LAYER + "ffn.router.layer.weight", "layer_{l}/ffn/router", TRANSPOSE),
    Row(mlp + "w1", "layer_{l}/ffn/gate", experts_flat(e, TRANSPOSE)),
    Row(mlp + "v1", "layer_{l}/ffn/up", experts_flat(e, TRANSPOSE)),
    Row(mlp + "w2", "layer_{l}/ffn/down", experts_flat(e, SAME)),
  ]
