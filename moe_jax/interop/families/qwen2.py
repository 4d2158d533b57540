"""Qwen2 and 2.5 without experts (arXiv 2407.10671): LLaMA with biases on queries, keys and values.

The released Qwen1.5 models have the same type.
"""

from __future__ import annotations

from typing import Any

from moe_jax.interop.families import common, llama
from moe_jax.interop.settings import Settings
from moe_jax.options import Config

MODEL_TYPE = "qwen2"
ARCHITECTURE = "Qwen2ForCausalLM"
PRESET = ""
IGNORED = common.IGNORED
rows = llama.rows


def keys(s: Settings) -> dict[str, Any]:
  """Returns the dotted keys of our config, with the values that a config.json gives them."""
  return (
    common.decoder_keys(s)
    | window_keys(s)
    | {
      "model.qkv_bias": True,
      "model.d_ff": s.take("intermediate_size"),
      "model.moe.num_experts": 0,
    }
  )


def window_keys(s: Settings) -> dict[str, Any]:
  """Returns the key of the sliding window, which all layers must have or none."""
  window = s.take("sliding_window", 0) if s.take("use_sliding_window", False) else 0
  first = s.take("max_window_layers", 0)
  s.ignore("sliding_window")
  layers = s.take("layer_types", None)
  if window and layers is None:
    # Qwen's first layers see everything, and its later layers the window.
    windowed = [i >= first for i in range(s.take("num_hidden_layers"))]
  else:
    windowed = [kind == "sliding_attention" for kind in layers or ()]
  if any(windowed) and not all(windowed):
    s.problem("layer_types has layers with a sliding window beside layers without one")
  return {"model.sliding_window": window if any(windowed) else 0}


def settings(m: Config) -> dict[str, Any]:
  """Returns the settings of a config.json for the section `model`; the inverse of `keys`."""
  return common.decoder_settings(m) | {"intermediate_size": m.d_ff} | window_settings(m)


def window_settings(m: Config) -> dict[str, Any]:
  """Returns the settings of `window_keys`."""
  if not m.sliding_window:
    return {"use_sliding_window": False}
  return {"use_sliding_window": True, "sliding_window": m.sliding_window, "max_window_layers": 0}
