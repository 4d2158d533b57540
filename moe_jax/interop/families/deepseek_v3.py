"""DeepSeek-V3 (arXiv 2412.19437): V2 with sigmoid gates that are balanced by a bias.

The layer of multi-token prediction is left out, by name. FP8 weights become bfloat16.
"""

from __future__ import annotations

from typing import Any

from moe_jax.interop.families import common, deepseek, deepseek_v2
from moe_jax.interop.rows import SAME, Row
from moe_jax.interop.settings import Settings
from moe_jax.interop.unrolled import BIAS
from moe_jax.options import Config

MODEL_TYPE = "deepseek_v3"
ARCHITECTURE = "DeepseekV3ForCausalLM"
PRESET = "deepseek_v3"
# The layer of multi-token prediction follows the others.
IGNORED = (*common.IGNORED, r"model\.layers\.{L}\..*")


def keys(s: Settings) -> dict[str, Any]:
  """Returns the dotted keys of our config, with the values that a config.json gives them.

  How the bias is balanced is not in it; that of the preset is used.
  """
  s.must("scoring_func", "sigmoid")
  s.must("topk_method", "noaux_tc")
  s.must("rope_interleave", True)
  s.must("num_nextn_predict_layers", 1, 0)
  k = s.take("num_experts_per_tok")
  options = {"k": k, "groups": s.take("n_group", 1), "kept_groups": s.take("topk_group", 1)}
  options["gate_norm"] = "top_k" if s.take("norm_topk_prob", True) else "none"
  routing = deepseek_v2.without_router(common.routing_keys(k, norm=True))
  del routing["model.moe.balancing.rule"]
  return (
    deepseek_v2.latent_keys(s)
    | routing
    | deepseek.sparse_keys(s)
    | {
      "model.moe.routed_scale": float(s.take("routed_scaling_factor", 1.0)),
      "model.moe.router.name": "sigmoid_bias",
      **{f"model.moe.router.sigmoid_bias.{name}": value for name, value in options.items()},
    }
  )


def settings(m: Config) -> dict[str, Any]:
  """Returns the settings of a config.json for the section `model`; the inverse of `keys`."""
  router = m.moe.router.sigmoid_bias
  return deepseek_v2.latent_settings(m) | {
    "num_experts_per_tok": router.k,
    "n_group": router.groups,
    "topk_group": router.kept_groups,
    "norm_topk_prob": router.gate_norm == "top_k",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 0,
  }


def rows(m: Config, fused: bool) -> list[Row]:
  """Returns which published tensor is which parameter of ours, see `rows.Row`."""
  name = common.LAYER + "mlp.gate.e_score_correction_bias"
  return [*deepseek_v2.rows(m, fused), Row(name, f"layer_{{l}}/{BIAS}", SAME, True)]
