"""What the published decoders share: names and settings that go back to LLaMA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_jax.interop.rows import SAME, TRANSPOSE, Op, Row, heads_bias, heads_in, heads_out, parts
from moe_jax.interop.settings import LLAMA, Settings, read_pairs, write_pairs
from moe_jax.layers import RopeOptions
from moe_jax.layers.rope_scaling import mscale
from moe_jax.layers.zero_experts import WITHOUT_FFN
from moe_jax.options import Config
from moe_jax.options import keys as option_keys

LAYER = "model.layers.{l}."
# The tables of the rotary embedding, which older checkpoints hold.
IGNORED = (r".*\.rotary_emb\.inv_freq",)


def decoder_keys(s: Settings) -> dict[str, Any]:
  """Returns the keys of a pre-norm decoder with grouped-query attention and SwiGLU."""
  s.must("hidden_act", "silu")
  heads = s.take("num_attention_heads")
  # A head dimension that is absent follows from the others, also where 0 or null stands for it.
  head_dim = s.take("head_dim", 0) or s.take("hidden_size") // heads
  keys = {
    "model.family": "decoder",
    "model.attention": "grouped_query",
    "model.num_kv_heads": s.take("num_key_value_heads", heads),
    "model.head_dim": head_dim,
    "model.qkv_bias": False,
    "model.output_bias": False,
    "model.mlp_bias": False,
    "model.qk_norm": False,
    "model.clip_qkv": 0.0,
    "model.sliding_window": 0,
    "model.query_scale": 0.0,
  }
  return keys | stream_keys(s) | rope_keys(s)


def stream_keys(s: Settings) -> dict[str, Any]:
  """Returns the keys of the embedding, the norms and the FFN."""
  return read_pairs(s, LLAMA) | {
    "model.activation": "swiglu",
    "model.norm": "rmsnorm",
    "model.norm_eps": s.take("rms_norm_eps", 1e-6),
    "model.embed_scale": False,
    "model.tied_embeddings": s.take("tie_word_embeddings", False),
    "model.position": "rope",
  }


def rope_keys(s: Settings, latent: bool = False) -> dict[str, Any]:
  """Returns the keys of the rotary embedding, of the old form of its settings or of the new one.

  Args:
    s: The settings.
    latent: Whether YaRN's `mscale_all_dim` changes the scores, too, as in DeepSeek.
  """
  r = s.section("rope_parameters" if s.take("rope_parameters", None) else "rope_scaling")
  s.ignore("rope_scaling")
  keys = {f"model.rope.{name}": key.default for name, key in option_keys(RopeOptions).items()}
  # Older files say "type".
  kind = r.take("rope_type", r.take("type", "default"))
  r.ignore("type", "rope_type")
  keys["model.rope_theta"] = float(r.take("rope_theta", s.take("rope_theta", 10_000.0)))
  s.ignore("rope_theta")
  if kind == "default":
    return keys
  if kind not in ("linear", "llama3", "yarn"):
    s.problem(f"rope_type={kind!r} must be default, linear, llama3 or yarn")
    return keys
  keys |= {"model.rope.scaling": kind, "model.rope.factor": float(r.take("factor"))}
  if kind == "linear":
    return keys
  original = r.take("original_max_position_embeddings", s.take("max_position_embeddings", 0))
  keys["model.rope.original_length"] = original
  names = _LLAMA3 if kind == "llama3" else _YARN
  keys |= {f"model.rope.{name}": float(r.take(name, keys[f"model.rope.{name}"])) for name in names}
  if kind == "yarn":
    r.must("truncate", True)
    own, all_dims = r.take("mscale", 0.0), r.take("mscale_all_dim", 0.0)
    if own and all_dims and not keys["model.rope.attention_factor"]:
      factor = keys["model.rope.factor"]
      keys["model.rope.attention_factor"] = mscale(factor, own) / mscale(factor, all_dims)
    if latent:
      keys["model.rope.score_mscale"] = float(all_dims)
  return keys


# The options of a scaling that have the name of the setting.
_LLAMA3 = ("low_freq_factor", "high_freq_factor")
_YARN = ("beta_fast", "beta_slow", "attention_factor")


def decoder_settings(m: Config) -> dict[str, Any]:
  """Returns the settings of `decoder_keys`."""
  return (
    write_pairs(m, {**LLAMA, "num_key_value_heads": "num_kv_heads", "head_dim": "head_dim"})
    | stream_settings(m)
    | rope_settings(m)
  )


def stream_settings(m: Config) -> dict[str, Any]:
  """Returns the settings of `stream_keys`."""
  pairs = {**LLAMA, "rms_norm_eps": "norm_eps", "tie_word_embeddings": "tied_embeddings"}
  return write_pairs(m, pairs) | {"hidden_act": "silu"}


def rope_settings(m: Config) -> dict[str, Any]:
  """Returns the settings of `rope_keys`, in the old form, which all versions read."""
  r = m.rope
  if r.scaling == "none":
    return {"rope_theta": m.rope_theta}
  scaling = {"type": r.scaling, "rope_type": r.scaling, "factor": r.factor}
  if r.scaling != "linear":
    scaling["original_max_position_embeddings"] = r.original_length
    names = _LLAMA3 if r.scaling == "llama3" else _YARN
    scaling |= {name: r[name] for name in names if r[name]}
  if r.score_mscale:
    scaling["mscale_all_dim"] = r.score_mscale
    # DeepSeek's own code knows no attention factor, but this quotient.
    if scaling.get("attention_factor") == 1:
      scaling["mscale"] = scaling["mscale_all_dim"]
  return {"rope_theta": m.rope_theta, "rope_scaling": scaling}


def sparse_keys(s: Settings, experts: str, width: str, norm: bool | None = None) -> dict[str, Any]:
  """Returns the keys of dropless top-k routing to SwiGLU experts in every layer.

  The losses of training are those of the family's preset. Hugging Face's own, which
  `router_aux_loss_coef` weighs, is k times ours at perfect balance; over several layers it pools
  counts and probabilities before it multiplies them, where ours is a mean over layers.

  Args:
    s: The settings.
    experts: The name of the number of experts.
    width: The name of an expert's hidden width.
    norm: Whether gates are renormalised over the chosen experts; None means that a setting says so.
  """
  normalised = bool(s.take("norm_topk_prob", False)) if norm is None else norm
  return routing_keys(s.take("num_experts_per_tok"), normalised) | {
    "model.moe.num_experts": s.take(experts),
    "model.moe.d_ff": s.take(width),
    "model.moe.first": 0,
    "model.moe.every": 1,
  }


def routing_keys(k: int, norm: bool) -> dict[str, Any]:
  """Returns the keys of dropless top-k routing without shared experts."""
  return {
    "model.moe.router.name": "top_k",
    "model.moe.router.top_k.k": k,
    "model.moe.router.top_k.gate_norm": "top_k" if norm else "none",
    "model.moe.gate_network": "linear",
    "model.moe.routed_scale": 1.0,
    "model.moe.num_shared_experts": 0,
    "model.moe.shared_gate": False,
    **{f"model.moe.{name}": 0 for name in WITHOUT_FFN},
    "model.moe.balancing.rule": "none",
    "model.moe.capacity_factor": None,
    "model.moe.eval_capacity_factor": None,
  }


def sparse_settings(m: Config, experts: str, width: str) -> dict[str, Any]:
  """Returns the settings of `sparse_keys`."""
  return {
    experts: m.moe.num_experts,
    width: m.moe.d_ff,
    "num_experts_per_tok": m.moe.router.top_k.k,
  }


def outer_rows(m: Config) -> list[Row]:
  """Returns the rows of the embedding, the head and all norms of the residual stream."""
  head = [] if m.tied_embeddings else [Row("lm_head.weight", "head", TRANSPOSE)]
  return head + [
    Row("model.embed_tokens.weight", "embedding", SAME),
    Row("model.norm.weight", "final_norm/scale", SAME),
    Row(LAYER + "input_layernorm.weight", "layer_{l}/attention_norm/scale", SAME),
    Row(LAYER + "post_attention_layernorm.weight", "layer_{l}/ffn_norm/scale", SAME),
  ]


def attention_rows(m: Config) -> list[Row]:
  """Returns the rows of grouped-query attention."""
  ops: Mapping[str, tuple[str, int]] = {
    "query": ("q", m.num_heads),
    "key": ("k", m.num_kv_heads),
    "value": ("v", m.num_kv_heads),
  }
  theirs, ours = LAYER + "self_attn.", "layer_{l}/attention/"
  rows = [Row(f"{theirs}o_proj.weight", f"{ours}output", heads_out(m.num_heads))]
  if m.output_bias:
    rows.append(Row(f"{theirs}o_proj.bias", f"{ours}output_bias", SAME))
  for name, (letter, heads) in ops.items():
    rows.append(Row(f"{theirs}{letter}_proj.weight", f"{ours}{name}", heads_in(heads)))
    if m.qkv_bias:
      rows.append(Row(f"{theirs}{letter}_proj.bias", f"{ours}{name}_bias", heads_bias(heads)))
    if m.qk_norm and name != "value":
      rows.append(Row(f"{theirs}{letter}_norm.weight", f"{ours}{name}_norm/scale", SAME))
  return rows


def ffn_rows(
  theirs: str, ours: str, experts: bool | None = None, biases: bool = False
) -> list[Row]:
  """Returns the rows of a SwiGLU FFN, of a layer or of an expert, with LLaMA's names."""
  names = ("gate", "up", "down")
  rows = [Row(f"{theirs}{n}_proj.weight", f"{ours}{n}", TRANSPOSE, experts) for n in names]
  if biases:
    rows += [Row(f"{theirs}{n}_proj.bias", f"{ours}{n}_bias", SAME, experts) for n in names]
  return rows


def expert_rows(m: Config, fused: bool, experts: str = "mlp.experts.") -> list[Row]:
  """Returns the rows of the experts of a layer, each in tensors of its own or all in two tensors.

  Args:
    m: The section `model` of the config.
    fused: Whether all experts are in two tensors, of which one has the gate before the other
      matrix.
    experts: The name of the experts inside a layer.
  """
  if not fused:
    return ffn_rows(LAYER + experts + "{e}.", "layer_{l}/ffn/", True)
  both = parts(TRANSPOSE, (m.moe.d_ff, m.moe.d_ff), -1)
  ours = ("layer_{l}/ffn/gate", "layer_{l}/ffn/up")
  return [
    Row(f"{LAYER}{experts}gate_up_proj", ours, both, True),
    Row(f"{LAYER}{experts}down_proj", "layer_{l}/ffn/down", TRANSPOSE, True),
  ]


def router_row(name: str, op: Op = TRANSPOSE) -> Row:
  """Returns the row of the router, whose name inside a layer is given."""
  return Row(LAYER + name, "layer_{l}/ffn/router", op, True)
