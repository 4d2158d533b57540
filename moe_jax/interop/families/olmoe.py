"""OLMoE (arXiv 2409.02060): 64 small experts a layer, top-8, normalised queries and keys.

The settings of the released model have no z-loss, which the preset `olmoe` adds for training.
"""

from __future__ import annotations

from typing import Any

from moe_jax.interop.families import common
from moe_jax.interop.rows import Row
from moe_jax.interop.settings import Settings
from moe_jax.options import Config

MODEL_TYPE = "olmoe"
ARCHITECTURE = "OlmoeForCausalLM"
PRESET = "olmoe"
IGNORED = common.IGNORED


def keys(s: Settings) -> dict[str, Any]:
  """Returns the dotted keys of our config, with the values that a config.json gives them."""
  s.must("attention_bias", False)
  sparse = common.sparse_keys(s, "num_experts", "intermediate_size")
  return (
    common.decoder_keys(s)
    | sparse
    | {
      "model.qk_norm": True,
      "model.clip_qkv": float(s.take("clip_qkv", 0.0)),
      # No layer has a dense FFN; this is its width with the same activated parameters.
      "model.d_ff": sparse["model.moe.d_ff"] * s.take("num_experts_per_tok"),
    }
  )


def settings(m: Config) -> dict[str, Any]:
  """Returns the settings of a config.json for the section `model`; the inverse of `keys`."""
  sparse = common.sparse_settings(m, "num_experts", "intermediate_size")
  return (
    common.decoder_settings(m)
    | sparse
    | {"norm_topk_prob": m.moe.router.top_k.gate_norm == "top_k", "clip_qkv": m.clip_qkv or None}
  )


def rows(m: Config, fused: bool) -> list[Row]:
  """Returns which published tensor is which parameter of ours, see `rows.Row`."""
  experts = [*common.expert_rows(m, fused), common.router_row("mlp.gate.weight")]
  return common.outer_rows(m) + common.attention_rows(m) + experts
