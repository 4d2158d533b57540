"""DeepSeekMoE-16B (arXiv 2401.06066): LLaMA's attention, fine-grained experts and shared ones.

The module also has what DeepSeek-V2 and V3 share with it.
"""

from __future__ import annotations

from typing import Any

from moe_jax.interop.families import common
from moe_jax.interop.rows import Row
from moe_jax.interop.settings import Settings, write_pairs
from moe_jax.options import Config

MODEL_TYPE = "deepseek"
ARCHITECTURE = "DeepseekForCausalLM"
PRESET = "deepseek_moe"
IGNORED = common.IGNORED
_SPARSE = {
  "n_routed_experts": "moe.num_experts",
  "n_shared_experts": "moe.num_shared_experts",
  "moe_intermediate_size": "moe.d_ff",
  "intermediate_size": "d_ff",
}


def keys(s: Settings) -> dict[str, Any]:
  """Returns the dotted keys of our config, with the values that a config.json gives them."""
  s.must("scoring_func", "softmax")
  s.must("attention_bias", False)
  return (
    common.decoder_keys(s)
    | common.routing_keys(s.take("num_experts_per_tok"), s.take("norm_topk_prob", False))
    | sparse_keys(s)
  )


def sparse_keys(s: Settings) -> dict[str, Any]:
  """Returns the keys of the sizes of experts, and of the layers that have some."""
  first, every = s.take("first_k_dense_replace", 0), s.take("moe_layer_freq", 1)
  # Only training reads these.
  s.ignore("aux_loss_alpha", "seq_aux")
  return {
    "model.d_ff": s.take("intermediate_size"),
    "model.moe.d_ff": s.take("moe_intermediate_size"),
    "model.moe.num_experts": s.take("n_routed_experts"),
    "model.moe.num_shared_experts": s.take("n_shared_experts", 0),
    # Layer i has experts if i >= first_k_dense_replace and moe_layer_freq divides i.
    "model.moe.first": -(-first // every) * every,
    "model.moe.every": every,
  }


def settings(m: Config) -> dict[str, Any]:
  """Returns the settings of a config.json for the section `model`; the inverse of `keys`."""
  return (
    common.decoder_settings(m)
    | sparse_settings(m)
    | {
      "num_experts_per_tok": m.moe.router.top_k.k,
      "norm_topk_prob": m.moe.router.top_k.gate_norm == "top_k",
      "scoring_func": "softmax",
    }
  )


def sparse_settings(m: Config) -> dict[str, Any]:
  """Returns the settings of `sparse_keys`."""
  layers = {"first_k_dense_replace": m.moe.first, "moe_layer_freq": m.moe.every}
  return write_pairs(m, _SPARSE) | layers


def rows(m: Config, fused: bool) -> list[Row]:
  """Returns which published tensor is which parameter of ours, see `rows.Row`."""
  return common.outer_rows(m) + common.attention_rows(m) + sparse_rows(m, fused)


def sparse_rows(m: Config, fused: bool) -> list[Row]:
  """Returns the rows of dense layers, experts, shared experts and the router."""
  mlp, ours = common.LAYER + "mlp.", "layer_{l}/ffn/"
  rows = common.ffn_rows(mlp, ours, False) + common.expert_rows(m, fused)
  if m.moe.num_shared_experts:
    rows += common.ffn_rows(mlp + "shared_experts.", ours + "shared/", True)
  return [*rows, common.router_row("mlp.gate.weight")]
