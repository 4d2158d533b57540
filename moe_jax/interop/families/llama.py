"""LLaMA 1 to 3 and what has its architecture, without experts (arXiv 2302.13971)."""

from __future__ import annotations

from typing import Any

from moe_jax.interop.families import common
from moe_jax.interop.rows import Row
from moe_jax.interop.settings import Settings
from moe_jax.options import Config

MODEL_TYPE = "llama"
ARCHITECTURE = "LlamaForCausalLM"
PRESET = ""
IGNORED = common.IGNORED


def keys(s: Settings) -> dict[str, Any]:
  """Returns the keys of our config that a config.json says."""
  s.must("attention_bias", False)
  s.must("mlp_bias", False)
  return common.decoder_keys(s) | {
    "model.d_ff": s.take("intermediate_size"),
    "model.moe.num_experts": 0,
  }


def settings(m: Config) -> dict[str, Any]:
  """Returns the settings of a config.json that `keys` reads."""
  return common.decoder_settings(m) | {"intermediate_size": m.d_ff}


def rows(m: Config, fused: bool) -> list[Row]:
  """Returns the map of the weights."""
  ffn = common.ffn_rows(common.LAYER + "mlp.", "layer_{l}/ffn/")
  return common.outer_rows(m) + common.attention_rows(m) + ffn
