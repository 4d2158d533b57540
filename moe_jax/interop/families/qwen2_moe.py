"""Qwen1.5-MoE and Qwen2-MoE (2024): small experts beside shared ones, whose output has a gate."""

from __future__ import annotations

from typing import Any

from moe_jax.interop.families import common, qwen2
from moe_jax.interop.rows import TRANSPOSE, Row
from moe_jax.interop.settings import Settings
from moe_jax.options import Config

MODEL_TYPE = "qwen2_moe"
ARCHITECTURE = "Qwen2MoeForCausalLM"
PRESET = "qwen1_5_moe"
IGNORED = common.IGNORED


def keys(s: Settings) -> dict[str, Any]:
  """Returns the dotted keys of our config, with the values that a config.json gives them."""
  sparse = common.sparse_keys(s, "num_experts", "moe_intermediate_size")
  step = s.take("decoder_sparse_step", 1)
  width, shared = sparse["model.moe.d_ff"], s.take("shared_expert_intermediate_size")
  if shared % width:
    s.problem(f"shared_expert_intermediate_size={shared} must be a multiple of {width}, an expert")
  return (
    common.decoder_keys(s)
    | sparse
    | qwen2.window_keys(s)
    | {
      "model.qkv_bias": s.take("qkv_bias", True),
      "model.d_ff": s.take("intermediate_size"),
      "model.moe.first": step - 1,
      "model.moe.every": step,
      "model.moe.dense_layers": tuple(s.take("mlp_only_layers", ())),
      "model.moe.num_shared_experts": shared // width,
      "model.moe.shared_gate": True,
    }
  )


def settings(m: Config) -> dict[str, Any]:
  """Returns the settings of a config.json for the section `model`; the inverse of `keys`."""
  sparse = common.sparse_settings(m, "num_experts", "moe_intermediate_size")
  return (
    common.decoder_settings(m)
    | sparse
    | qwen2.window_settings(m)
    | {
      "norm_topk_prob": m.moe.router.top_k.gate_norm == "top_k",
      "qkv_bias": m.qkv_bias,
      "intermediate_size": m.d_ff,
      "decoder_sparse_step": m.moe.every,
      "mlp_only_layers": list(m.moe.dense_layers),
      "shared_expert_intermediate_size": m.moe.num_shared_experts * m.moe.d_ff,
    }
  )


def rows(m: Config, fused: bool) -> list[Row]:
  """Returns which published tensor is which parameter of ours, see `rows.Row`."""
  dense = common.ffn_rows(common.LAYER + "mlp.", "layer_{l}/ffn/", False)
  shared = common.ffn_rows(common.LAYER + "mlp.shared_expert.", "layer_{l}/ffn/shared/", True)
  gate = Row(
    common.LAYER + "mlp.shared_expert_gate.weight", "layer_{l}/ffn/shared_gate", TRANSPOSE, True
  )
  experts = [*common.expert_rows(m, fused), common.router_row("mlp.gate.weight")]
  return common.outer_rows(m) + common.attention_rows(m) + dense + experts + shared + [gate]
