"""The published families, one module each.

A module has:

    MODEL_TYPE    `model_type` of the family's config.json
    ARCHITECTURE  the class of transformers that reads its checkpoints
    PRESET        the routing preset with the losses of its training, or a preset for each name of a
                  router; "" without experts
    IGNORED       regular expressions of tensors that hold no weights or are left out on purpose;
                  {L} stands for the number of layers
    keys(s)       a `Settings` of the config.json -> dotted key of our config -> value
    settings(m)   the inverse: the section `model` -> settings
    rows(m, fused)  the map of the weights (`rows.py`); `fused` is whether a layer's experts are
                  stacked in one tensor, as newer versions of transformers hold them in memory
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

# model_type -> the module with this name.
FAMILIES = (
  "llama",
  "qwen2",
  "mixtral",
  "olmoe",
  "qwen2_moe",
  "dbrx",
  "deepseek",
  "deepseek_v2",
  "deepseek_v3",
  "llama_moe",
  "t5",
  "switch_transformers",
)


def find(model_type: str) -> Any:
  """Returns the module of a family, for a name of `FAMILIES`."""
  return importlib.import_module(f"{__name__}.{model_type}")


# What no published family has, so that every one of them requires it: key of `model` -> value.
PLAIN: Mapping[str, Any] = {
  "target_vocab_size": 0,
  "qk_norm_over": "token",
  "global_every": 0,
  "rotary_dim": 0,
  "sinks": False,
  "ffn_bias": "none",
  "moe.expert_bias": False,
  "moe.hash_layers": 0,
  "moe.latent_width": 0,
  "moe.gate_residual": False,
  "moe.router_norm": "none",
  "moe.router_bias": False,
  "moe.logit_scale": 1.0,
  "moe.logit_softcap": 0.0,
  "moe.expert_scale": False,
  "moe.gate_on": "output",
  "moe.extra_ffn": False,
  "moe.soft_slots": 0,
  "moe.activation": "",
  "moe.router_dtype": "float32",
  "moe.capacity_slots": 0,
  "moe.encoder_priority": "",
  "moe.dense_layers": (),
}
