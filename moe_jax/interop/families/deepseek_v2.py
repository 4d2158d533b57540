"""DeepSeek-V2 and V2-Lite (arXiv 2405.04434): latent attention, experts on few devices a token."""

from __future__ import annotations

from typing import Any

from moe_jax.interop.families import common, deepseek
from moe_jax.interop.rows import SAME, TRANSPOSE, Row, halves, heads_in, heads_out, parts
from moe_jax.interop.settings import LLAMA, Settings, write_pairs
from moe_jax.options import Config

MODEL_TYPE = "deepseek_v2"
ARCHITECTURE = "DeepseekV2ForCausalLM"
# V2-Lite has no groups, and the losses of DeepSeekMoE.
PRESET = {"device_limited": "deepseek_v2", "top_k": "deepseek_moe"}
IGNORED = common.IGNORED
_LATENT = {
  "kv_lora_rank": "latent.kv_rank",
  "qk_nope_head_dim": "latent.nope_dim",
  "qk_rope_head_dim": "latent.rope_dim",
  "v_head_dim": "latent.value_dim",
}


def keys(s: Settings) -> dict[str, Any]:
  """Returns the dotted keys of our config, with the values that a config.json gives them."""
  s.must("scoring_func", "softmax")
  s.must("norm_topk_prob", False)
  s.must("mlp_bias", False)
  found = latent_keys(s) | deepseek.sparse_keys(s)
  found |= common.routing_keys(s.take("num_experts_per_tok"), norm=False)
  found["model.moe.num_shared_experts"] = s.take("n_shared_experts", 0)
  found["model.moe.routed_scale"] = float(s.take("routed_scaling_factor", 1.0))
  if s.must("topk_method", "greedy", "group_limited_greedy") == "greedy":
    s.ignore("n_group", "topk_group")
    return found
  # Only the router's name and options differ from those without groups.
  options = {"k": s.take("num_experts_per_tok"), "groups": s.take("n_group")}
  options |= {"kept_groups": s.take("topk_group"), "gate_norm": "none"}
  return without_router(found) | {
    # The losses count the groups as devices.
    "model.moe.devices": options["groups"],
    "model.moe.router.name": "device_limited",
    **{f"model.moe.router.device_limited.{name}": value for name, value in options.items()},
  }


def without_router(keys: dict[str, Any]) -> dict[str, Any]:
  """Returns the keys without the name of the router and its options."""
  return {name: value for name, value in keys.items() if ".router." not in name}


def latent_keys(s: Settings) -> dict[str, Any]:
  """Returns the keys of latent attention and of everything around the FFN."""
  s.must("hidden_act", "silu")
  s.must("attention_bias", False)
  heads = s.take("num_attention_heads")
  # These say nothing new: all heads have keys of their own, of the widths below.
  s.ignore("num_key_value_heads", "head_dim", "qk_head_dim")
  return (
    common.stream_keys(s)
    | common.rope_keys(s, latent=True)
    | {
      "model.family": "decoder",
      "model.attention": "latent",
      "model.num_kv_heads": heads,
      "model.head_dim": s.take("v_head_dim"),
      "model.latent.query_rank": s.take("q_lora_rank", 0),
      "model.mlp_bias": False,
      **{f"model.{key}": s.take(name) for name, key in _LATENT.items()},
    }
  )


def settings(m: Config) -> dict[str, Any]:
  """Returns the settings of a config.json for the section `model`; the inverse of `keys`."""
  router = m.moe.router[m.moe.router.name]
  groups = {"topk_method": "greedy"}
  if m.moe.router.name == "device_limited":
    groups = {
      "topk_method": "group_limited_greedy",
      "n_group": router.groups,
      "topk_group": router.kept_groups,
    }
  return (
    latent_settings(m)
    | groups
    | {"num_experts_per_tok": router.k, "norm_topk_prob": False, "scoring_func": "softmax"}
  )


def latent_settings(m: Config) -> dict[str, Any]:
  """Returns the settings of `latent_keys`, and of the sizes of experts."""
  return (
    write_pairs(m, {**LLAMA, **_LATENT})
    | common.stream_settings(m)
    | common.rope_settings(m)
    | deepseek.sparse_settings(m)
    | {
      "num_key_value_heads": m.num_heads,
      "q_lora_rank": m.latent.query_rank or None,
      "routed_scaling_factor": m.moe.routed_scale,
    }
  )


def rows(m: Config, fused: bool) -> list[Row]:
  """Returns which published tensor is which parameter of ours, see `rows.Row`."""
  return common.outer_rows(m) + latent_rows(m) + deepseek.sparse_rows(m, fused)


def latent_rows(m: Config) -> list[Row]:
  """Returns the rows of latent attention."""
  theirs, ours, size = common.LAYER + "self_attn.", "layer_{l}/attention/", m.latent
  query = halves(heads_in(m.num_heads), size.rope_dim)
  down = parts(halves(TRANSPOSE, size.rope_dim), (size.kv_rank, size.rope_dim), -1)
  up = parts(heads_in(m.num_heads), (size.nope_dim, size.value_dim), -1)
  rows = [
    Row(f"{theirs}kv_a_proj_with_mqa.weight", (f"{ours}latent", f"{ours}key_rope"), down),
    Row(f"{theirs}kv_a_layernorm.weight", f"{ours}latent_norm/scale", SAME),
    Row(f"{theirs}kv_b_proj.weight", (f"{ours}key", f"{ours}value"), up),
    Row(f"{theirs}o_proj.weight", f"{ours}output", heads_out(m.num_heads)),
  ]
  if not size.query_rank:
    return [*rows, Row(f"{theirs}q_proj.weight", f"{ours}query", query)]
  return [
    *rows,
    Row(f"{theirs}q_a_proj.weight", f"{ours}query_latent", TRANSPOSE),
    Row(f"{theirs}q_a_layernorm.weight", f"{ours}query_latent_norm/scale", SAME),
    Row(f"{theirs}q_b_proj.weight", f"{ours}query", query),
  ]
