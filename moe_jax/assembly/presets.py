"""Routing presets with the values of the papers, chosen by `--config.model.moe=NAME`.

A preset sets every option of routing. Options that its paper does not mention get their `NEUTRAL`
values, never those of the config to which the preset is applied. What belongs to the size of a
model stays as the config says: which layers have experts, the dispatcher, the number of experts
(unless the paper has only one), and the hidden width that a token's experts have together. That
width is divided by the number of experts that the preset activates.

Coefficients are converted to this package's losses, which are 1 at perfect balance (CV^2 is 0). If
a paper's loss is K at balance, its coefficient is multiplied by K here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from moe_jax.assembly.experts import experts_a_token
from moe_jax.assembly.sections import NEUTRAL, check_config
from moe_jax.errors import ConfigError, choose
from moe_jax.options import Config
from moe_jax.routing import ROUTERS

_SHAZEER = {
  "router_init_scale": 0.0,
  "importance_loss": 0.1,
  "importance_of": "gates",
  "load_loss": 0.1,
  "layer_reduce": "sum",
}
# The paper does not give the coefficient; 0.01 is that of Mesh-TensorFlow and GLaM. The capacity of
# 1.0 S*K/E is the paper's 2N/(G E).
_GSHARD = {
  "capacity_factor": 1.0,
  "capacity_basis": "assignments",
  "balance_loss": 0.01,
  "balance_counts": "top_1",
  "layer_reduce": "sum",
}
_SWITCH = {
  "capacity_factor": 1.25,
  "eval_capacity_factor": 2.0,
  "jitter": 0.01,
  "balance_loss": 0.01,
  "balance_counts": "top_1",
  "layer_reduce": "sum",
}
_ST_MOE = {
  "capacity_factor": 1.25,
  "eval_capacity_factor": 2.0,
  "balance_loss": 0.01,
  "balance_counts": "top_1",
  "z_loss": 0.001,
}

# Each preset consists of the router's name, options of the router, and keys of model.moe.
PRESETS: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]] = {
  "adaptive_mixtures": ("adaptive_mixture", {}, {}),
  "noisy_top_k": ("noisy_top_k", {"k": 4}, _SHAZEER),
  # MoE-256-h has 16 groups of 16 experts. A token picks 2 groups, and 2 experts of each.
  "hierarchical": (
    "hierarchical",
    {"groups": 16, "primary_k": 2, "k": 2},
    _SHAZEER | {"num_experts": 256},
  ),
  "strictly_balanced": ("strictly_balanced", {"k": 4}, {"threshold_loss": 1.0}),
  "gshard": ("gshard", {}, _GSHARD),
  "mesh_tf_top_2": (
    "gshard",
    {"threshold": 0.2, "skipped_keeps_slot": False},
    _GSHARD
    | {
      "capacity_factor": 1.25,
      "eval_capacity_factor": 2.0,
      "capacity_basis": "tokens",
      "capacity_rounding": "down",
      "min_capacity": 4,
    },
  ),
  "glam": ("gshard", {}, _GSHARD),
  "switch": ("top_k", {"k": 1, "gate_norm": "none"}, _SWITCH),
  "switch_no_token_left_behind": (
    "no_token_left_behind",
    {"choices": 4, "capacity_factor": 1.25},
    {**_SWITCH, "capacity_factor": None, "eval_capacity_factor": None},
  ),
  "expert_choice": ("expert_choice", {"capacity_factor": 2.0}, {}),
  "expert_choice_cap_2": ("capped_expert_choice", {"capacity_factor": 2.0, "max_experts": 2}, {}),
  "expert_choice_cap_3": ("capped_expert_choice", {"capacity_factor": 2.0, "max_experts": 3}, {}),
  "st_moe": ("st_moe", {"k": 2, "policy": "random", "threshold": 0.2}, _ST_MOE),
  "st_moe_batch_prioritised": ("st_moe", {"k": 2, "priority": "gate"}, _ST_MOE),
  "base_layers": ("base", {}, {}),
  "s_base": ("sinkhorn", {"k": 1}, {}),
  "hash": ("hash_layer", {"method": "random"}, {}),
  "random": ("random_choice", {"k": 1}, {}),
  # With 8 experts these are 64 slots, for sequences of about 128 tokens. The paper has as many
  # slots as an image has patches.
  "soft_moe": ("top_k", {}, {"soft_slots": 8}),
  # The released coefficient 0.02 belongs to Hugging Face's loss, which is K = 2 at balance.
  "mixtral": (
    "top_k",
    {"k": 2, "gate_norm": "top_k"},
    {"balance_loss": 0.02 * 2, "balance_over": "global"},
  ),
  # DBRX was trained with MegaBlocks, whose loss is 1 at balance.
  "dbrx": (
    "top_k",
    {"k": 4, "gate_norm": "top_k"},
    {"num_experts": 16, "balance_loss": 0.05, "balance_over": "global"},
  ),
  "qwen1_5_moe": (
    "top_k",
    {"k": 4, "gate_norm": "none"},
    {
      "num_experts": 60,
      "num_shared_experts": 4,
      "shared_gate": True,
      "balance_loss": 0.001 * 4,
      "balance_over": "global",
    },
  ),
  "olmoe": (
    "top_k",
    {"k": 8, "gate_norm": "none"},
    {"num_experts": 64, "balance_loss": 0.01, "z_loss": 0.001, "balance_over": "global"},
  ),
  # The CV^2 of LLaMA-MoE uses the unbiased variance, which is E/(E - 1) times this package's. Gates
  # are multiplied by N/k.
  "llama_moe": (
    "noisy_top_k",
    {"k": 4, "noise_floor": 0.01},
    {
      "num_experts": 16,
      "gate_network": "tanh",
      "routed_scale": 4.0,
      "importance_loss": 0.01 * 16 / 15,
      "importance_of": "gates",
      "load_loss": 0.01 * 16 / 15,
    },
  ),
  "deepseek_moe": (
    "top_k",
    {"k": 6, "gate_norm": "none"},
    {"num_experts": 64, "num_shared_experts": 2, "balance_loss": 0.001},
  ),
  "deepseek_moe_145b": (
    "top_k",
    {"k": 12, "gate_norm": "none"},
    {
      "num_experts": 128,
      "num_shared_experts": 4,
      "balance_loss": 0.003,
      "device_loss": 0.05,
      "devices": 4,
    },
  ),
  "deepseek_v2": (
    "device_limited",
    {"k": 6, "groups": 8, "kept_groups": 3},
    {
      "num_experts": 160,
      "num_shared_experts": 2,
      "routed_scale": 16.0,
      "balance_loss": 0.003,
      "device_loss": 0.05,
      "communication_loss": 0.02,
      "devices": 8,
    },
  ),
  "deepseek_v3": (
    "sigmoid_bias",
    {"k": 8, "groups": 8, "kept_groups": 4},
    {
      "num_experts": 256,
      "num_shared_experts": 1,
      "routed_scale": 2.5,
      "balance_loss": 1e-4,
      "balance_scores": "sigmoid",
      "balancing.rule": "sign",
      "balancing.rate": 0.001,
    },
  ),
  # The first three layers of the paper take experts by a table of token ids, with learned gates;
  # that belongs to the size, model.moe.hash_layers=3. That P averages shares of the scores is taken
  # from DeepSeek-V3.
  "deepseek_v4": (
    "scored_top_k",
    {"k": 6, "score": "sqrt_softplus", "norm_eps": 1e-20},
    {
      "num_experts": 256,
      "num_shared_experts": 1,
      "routed_scale": 1.5,
      "balance_loss": 1e-4,
      "balance_scores": "sqrt_softplus",
      "balancing.rule": "sign",
      "balancing.rate": 0.001,
    },
  ),
  # How gpt-oss was balanced is not published. Its experts' biases and activation are no part of the
  # routing. The 20B model has 32 experts.
  "gpt_oss": ("top_k", {"k": 4, "gate_norm": "top_k"}, {"num_experts": 128, "router_bias": True}),
  # The released coefficient 0.001 belongs to Hugging Face's loss, which is K = 8 at balance.
  "qwen3_moe": (
    "top_k",
    {"k": 8, "gate_norm": "top_k"},
    {"num_experts": 128, "balance_loss": 0.001 * 8, "balance_over": "global"},
  ),
  # Maverick has 128 experts. How Llama 4 was balanced is not published; the coefficient 0.001 is
  # the default of the released code, whose loss is K = 1 at balance.
  "llama4": (
    "scored_top_k",
    {"k": 1, "score": "sigmoid", "gate_norm": "none"},
    {
      "num_experts": 16,
      "num_shared_experts": 1,
      "gate_on": "input",
      "balance_loss": 0.001,
      "balance_over": "global",
    },
  ),
  # The released model has no groups of experts. That the bias moves as DeepSeek-V3's does, and at
  # its rate, is taken from that paper.
  "kimi_k2": (
    "sigmoid_bias",
    {"k": 8},
    {
      "num_experts": 384,
      "num_shared_experts": 1,
      "routed_scale": 2.827,
      "balancing.rule": "sign",
      "balancing.rate": 0.001,
    },
  ),
  # GLM-4.5-Air has 128 experts and the scale 1. The rate of the bias is DeepSeek-V3's.
  "glm_4_5": (
    "sigmoid_bias",
    {"k": 8},
    {
      "num_experts": 160,
      "num_shared_experts": 1,
      "routed_scale": 2.5,
      "balancing.rule": "sign",
      "balancing.rate": 0.001,
    },
  ),
  # The routing of the first three layers of DeepSeek-V4, for a model that has no other.
  "deepseek_v4_hash": (
    "hash_top_k",
    {"k": 6},
    {"num_experts": 256, "num_shared_experts": 1, "routed_scale": 1.5},
  ),
  # The rule and its first weight are the paper's; the number of experts is a choice of ours.
  "remoe": (
    "relu",
    {"k": 1},
    {"num_experts": 8, "sparsity_loss": 1e-8, "balancing.rule": "sparsity"},
  ),
  # The next five have the rules of their papers; sizes, p and the weights of losses are choices
  # that were not checked against the papers' text.
  "top_p": ("top_p", {"p": 0.4}, {"num_experts": 16, "balance_loss": 0.01, "entropy_loss": 1e-4}),
  "dtop_p": (
    "top_p",
    {"p": 0.4},
    {"num_experts": 16, "balance_loss": 0.01, "balancing.rule": "mean_k"},
  ),
  "expert_threshold": (
    "expert_threshold",
    {"k": 2},
    {"num_experts": 16, "balancing.rule": "expert_quantile"},
  ),
  # The published model has 16 experts; its balance loss has the coefficient of the released code,
  # whose loss is K = 2 at balance.
  "phi_3_5_moe": (
    "sparse_mixer",
    {"k": 2, "epsilon": 0.01},
    {"num_experts": 16, "balance_loss": 0.001 * 2, "balance_over": "global"},
  ),
  # The paper has tiles of 128 rows for all tokens of a device; groups here are single sequences.
  "token_rounding": (
    "token_rounding",
    {"k": 2, "tile": 8},
    {"num_experts": 16, "balance_loss": 0.01},
  ),
  "sequence_top_k": ("sequence_top_k", {"k": 2}, {"num_experts": 16, "balance_loss": 0.01}),
  # The kinds of experts and tau are the paper's. Three things were not checked against its text:
  # that 8 experts have 2 constant ones beside them, the weight of the loss, and that the loss is
  # scaled as here. What the layer leaves out is told in `layers/zero_experts.py`.
  "moe_plus_plus": (
    "top_k",
    {"k": 2, "gate_norm": "top_k"},
    {
      "num_experts": 8,
      "zero_experts": 1,
      "copy_experts": 1,
      "constant_experts": 2,
      "zero_tau": 0.75,
      "gate_residual": True,
      "balance_loss": 0.01,
    },
  ),
  # Sizes, scale and gates are those of the published model. The report moves the bias in proportion
  # to what an expert lacks, but not that of the identity experts, which here move like others; its
  # rate is not known to us. The balance between groups of devices is left out.
  "longcat_flash": (
    "top_k",
    {"k": 12, "gate_norm": "none"},
    {
      "num_experts": 512,
      "copy_experts": 256,
      "routed_scale": 6.0,
      "balancing.rule": "proportional",
    },
  ),
}


def use_preset(config: Config, name: str) -> None:
  """Writes a preset into `config.model.moe`.

  Args:
    config: A config whose model has experts.
    name: A key of `PRESETS`.

  Raises:
    ConfigError: If there is no such preset, if the config's model is dense, or if a value of the
      config is not allowed.
  """
  if name in ROUTERS and name not in PRESETS:
    raise ConfigError(
      "model.moe", name, f"is a router and no preset; use --config.model.moe.router.name={name}"
    )
  router, options, keys = choose("model.moe", name, PRESETS)
  # The values must be checked first, because the code below divides by some of them.
  check_config(config)
  m = config.model
  e, length = m.moe, config.data.seq_len
  if not e.num_experts:
    raise ConfigError(
      "model.moe", name, "the config's model is dense (num_experts=0); use a config with experts"
    )
  # The hidden width of a token's experts together, which the preset keeps.
  width = e.d_ff * (experts_a_token(m, length) + e.num_shared_experts)
  with e.unlocked():
    e.update_from_flattened_dict(NEUTRAL | keys)
    section: Config = ConfigDict(
      {"name": router} | {each: dict(one.options) for each, one in ROUTERS.items()}
    )
    section[router].update(options)
    e.router = section
  e.d_ff = max(round(width / (experts_a_token(m, length) + e.num_shared_experts)), 1)
