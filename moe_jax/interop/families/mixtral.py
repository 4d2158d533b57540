"""Mixtral (arXiv 2401.04088): 8 SwiGLU experts in each layer, top-2."""

from __future__ import annotations

from typing import Any

from moe_jax.interop.families import common
from moe_jax.interop.rows import TRANSPOSE, Row
from moe_jax.interop.settings import Settings
from moe_jax.options import Config

MODEL_TYPE = "mixtral"
ARCHITECTURE = "MixtralForCausalLM"
PRESET = "mixtral"
IGNORED = common.IGNORED
# The name of an expert's matrix in the checkpoint -> here.
MATRICES = {"w1": "gate", "w3": "up", "w2": "down"}


def keys(s: Settings) -> dict[str, Any]:
  """Returns the dotted keys of our config, with the values that a config.json gives them."""
  sparse = common.sparse_keys(s, "num_local_experts", "intermediate_size", norm=True)
  return (
    common.decoder_keys(s)
    | sparse
    | {"model.sliding_window": s.take("sliding_window", 0), "model.d_ff": sparse["model.moe.d_ff"]}
  )


def settings(m: Config) -> dict[str, Any]:
  """Returns the settings of a config.json for the section `model`; the inverse of `keys`."""
  window = {"sliding_window": m.sliding_window or None}
  sparse = common.sparse_settings(m, "num_local_experts", "intermediate_size")
  return common.decoder_settings(m) | sparse | window


def rows(m: Config, fused: bool) -> list[Row]:
  """Returns which published tensor is which parameter of ours, see `rows.Row`."""
  if fused:
    experts = [*common.expert_rows(m, True), common.router_row("mlp.gate.weight")]
  else:
    place = "block_sparse_moe."
    experts = [
      Row(
        f"{common.LAYER}{place}experts.{{e}}.{theirs}.weight",
        f"layer_{{l}}/ffn/{ours}",
        TRANSPOSE,
        True,
      )
      for theirs, ours in MATRICES.items()
    ] + [common.router_row(f"{place}gate.weight")]
  return common.outer_rows(m) + common.attention_rows(m) + experts
