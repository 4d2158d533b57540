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
  """Returns the dotted keys of our config, with the values that a config.json gives them."""
  bias = s.take("attention_bias", False)
  return common.decoder_keys(s) | {
    "model.qkv_bias": bias,
    "model.output_bias": bias,
    "model.mlp_bias": s.take("mlp_bias", False),
    "model.d_ff": s.take("intermediate_size"),
    "model.moe.num_experts": 0,
  }


def settings(m: Config) -> dict[str, Any]:
  """Returns the settings of a config.json for the section `model`; the inverse of `keys`."""
  biases = {"attention_bias": m.qkv_bias, "mlp_bias": m.mlp_bias}
  return common.decoder_settings(m) | {"intermediate_size": m.d_ff} | biases


def rows(m: Config, fused: bool) -> list[Row]:
  """Returns which published tensor is which parameter of ours, see `rows.Row`."""
  ffn = common.ffn_rows(common.LAYER + "mlp.", "layer_{l}/ffn/", biases=m.mlp_bias)
  return common.outer_rows(m) + common.attention_rows(m) + ffn
