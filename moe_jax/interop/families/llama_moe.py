"""LLaMA-MoE (arXiv 2406.16554): LLaMA-2-7B's FFNs split into experts behind a tanh gate.

The names of settings and tensors are those of the code that comes with the released models, from
memory: transformers does not have the family.
"""

from __future__ import annotations

from typing import Any

from moe_jax.interop.families import common
from moe_jax.interop.rows import TRANSPOSE, Row
from moe_jax.interop.settings import Settings
from moe_jax.options import Config

MODEL_TYPE = "llama_moe"
ARCHITECTURE = "LlamaMoEForCausalLM"
PRESET = "llama_moe"
IGNORED = common.IGNORED
MATRICES = {"weight_gate": "gate", "weight_up": "up", "weight_down": "down"}
GATE = {
  "gate_network.0": "router_hidden",
  "gate_network.2": "router",
  "weight_noise": "router_noise",
}


def keys(s: Settings) -> dict[str, Any]:
  """Returns the dotted keys of our config, with the values that a config.json gives them."""
  s.must("gate_type", "TopKBalancedNoisyGate")
  s.must("gate_network", "mlp")
  s.must("gate_use_softmax", True)
  s.must("gate_add_noise", True)
  s.must("calculator_type", "UniversalCalculator")
  s.must("multiply_gate_scores", True)
  # Only training reads these.
  s.ignore("gate_balance_loss_weight", "gate_use_balance", "add_weight_norm", "drop_tokens")
  experts, k, full = s.take("num_experts"), s.take("num_selects"), s.take("intermediate_size")
  sizes = s.take("size_experts", [])
  if any(size != full // experts for layer in sizes for size in layer) or full % experts:
    s.problem(f"size_experts must be {full}/{experts} everywhere")
  options = {"k": k, "noise_floor": float(s.take("gate_noise_epsilon", 0.01))}
  routing = common.routing_keys(k, norm=True)
  found = common.decoder_keys(s) | {n: v for n, v in routing.items() if ".router." not in n}
  return found | {
    "model.d_ff": full,
    "model.moe.num_experts": experts,
    "model.moe.d_ff": full // experts,
    "model.moe.first": 0,
    "model.moe.every": 1,
    "model.moe.gate_network": "tanh",
    "model.moe.routed_scale": float(s.take("score_scale_factor", 1.0)),
    "model.moe.router.name": "noisy_top_k",
    **{f"model.moe.router.noisy_top_k.{name}": value for name, value in options.items()},
  }


def settings(m: Config) -> dict[str, Any]:
  """Returns the settings of a config.json for the section `model`; the inverse of `keys`."""
  router, e = m.moe.router.noisy_top_k, m.moe
  return common.decoder_settings(m) | {
    "intermediate_size": e.num_experts * e.d_ff,
    "num_experts": e.num_experts,
    "num_selects": router.k,
    "size_experts": [[e.d_ff] * e.num_experts] * m.num_layers,
    "gate_type": "TopKBalancedNoisyGate",
    "gate_network": "mlp",
    "gate_use_softmax": True,
    "gate_add_noise": True,
    "gate_noise_epsilon": router.noise_floor,
    "calculator_type": "UniversalCalculator",
    "multiply_gate_scores": True,
    "score_scale_factor": e.routed_scale,
  }


def rows(m: Config, fused: bool) -> list[Row]:
  """Returns which published tensor is which parameter of ours, see `rows.Row`."""
  mlp, ours = common.LAYER + "mlp.", "layer_{l}/ffn/"
  gate = [Row(f"{mlp}gate.{name}.weight", ours + our, TRANSPOSE) for name, our in GATE.items()]
  experts = [
    Row(f"{mlp}calculator.experts.{name}.{{e}}", ours + our, TRANSPOSE, True)
    for name, our in MATRICES.items()
  ]
  return common.outer_rows(m) + common.attention_rows(m) + gate + experts
