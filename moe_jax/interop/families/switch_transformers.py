"""Switch Transformers (arXiv 2101.03961): T5 with top-1 experts in every other layer.

An expert has a number of slots for each row, whatever its length. Deviation: in transformers,
padding occupies slots, too.
"""

from __future__ import annotations

from typing import Any

from moe_jax.interop.families import common, t5
from moe_jax.interop.rows import TRANSPOSE, Row
from moe_jax.interop.settings import Settings
from moe_jax.options import Config

MODEL_TYPE = "switch_transformers"
ARCHITECTURE = "SwitchTransformersForConditionalGeneration"
PRESET = "switch"
IGNORED = t5.IGNORED
_STACKS = {"encoder": "num_layers", "decoder": "num_decoder_layers"}


def keys(s: Settings) -> dict[str, Any]:
  """Returns the dotted keys of our config, with the values that a config.json gives them."""
  s.must("dense_act_fn", "relu")
  s.must("feed_forward_proj", "relu")
  s.must("router_bias", False)
  s.must("router_dtype", "float32")
  # Only training reads these; the steps follow from the numbers of sparse layers.
  s.ignore("router_z_loss_coef", "router_ignore_padding_tokens", "add_router_probs", "is_gated_act")
  s.ignore("router_type", "batch_prioritized_routing", "num_selected_experts")
  steps = set()
  for stack, layers in _STACKS.items():
    s.ignore(f"{stack}_sparse_step")
    sparse = s.take(f"num_sparse_{stack}_layers", 3)
    steps.add(s.take(layers, s.take("num_layers")) // sparse if sparse else None)
  step = next(iter(steps))
  if len(steps) > 1 or not step:
    s.problem("the encoder and the decoder must have experts in the same layers")
    step = 1
  return (
    t5.common_keys(s)
    | common.routing_keys(1, norm=False)
    | {
      "model.tied_embeddings": s.take("tie_word_embeddings", True),
      "model.activation": "relu",
      "model.moe.num_experts": s.take("num_experts"),
      "model.moe.d_ff": s.take("d_ff"),
      "model.moe.capacity_slots": s.take("expert_capacity", 64),
      "model.moe.group_size": 0,
      "model.moe.group_rows": 1,
      # Layer i has experts if i % step is 1, or if step is 1.
      "model.moe.first": min(step - 1, 1),
      "model.moe.every": step,
    }
  )


def settings(m: Config) -> dict[str, Any]:
  """Returns the settings of a config.json for the section `model`; the inverse of `keys`."""
  layers = {"encoder": m.num_encoder_layers or m.num_layers, "decoder": m.num_layers}
  sparse = {f"num_sparse_{stack}_layers": n // m.moe.every for stack, n in layers.items()}
  return (
    t5.common_settings(m)
    | sparse
    | {
      "tie_word_embeddings": m.tied_embeddings,
      "dense_act_fn": m.activation,
      "num_experts": m.moe.num_experts,
      "expert_capacity": m.moe.capacity_slots,
    }
  )


def rows(m: Config, fused: bool) -> list[Row]:
  """Returns which published tensor is which parameter of ours, see `rows.Row`."""
  rows = t5.outer_rows(m)
  for stack, place in t5.FFNS.items():
    mlp, ours = f"{place}mlp.", f"{stack}/layer_{{l}}/ffn/"
    rows.append(Row(f"{mlp}router.classifier.weight", f"{ours}router", TRANSPOSE, True))
    for theirs, name in t5.matrices(m.activation).items():
      rows += [
        Row(f"{mlp}{theirs}.weight", ours + name, TRANSPOSE, False),
        Row(f"{mlp}experts.expert_{{e}}.{theirs}.weight", ours + name, TRANSPOSE, True),
      ]
  return rows
