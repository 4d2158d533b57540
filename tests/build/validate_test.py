"""Wrong configs become a sentence that names field, value and remedy."""

import pytest
from changed import config

from moe_jax import build
from moe_jax.errors import ConfigError

pytestmark = pytest.mark.unit


def test_the_base_config_is_valid():
  # Catches: a check that refuses the default.
  for devices in (None, 1, 2, 8):
    build.validate(config(), devices)


R, W = "model.moe.router", "model.moe.dispatcher"
WRONG = [  # changes, the field that is blamed, words of the remedy
    ({f"{R}.name": "swich"}, f"{R}.name", "known: adaptive_mixture, "),
    ({f"{R}.name": "expert_choise"}, f"{R}.name", "did you mean 'expert_choice'"),
    ({f"{W}.name": "groupd"}, f"{W}.name", "did you mean 'grouped'"),
    ({"model.family": "decodr"}, "model.family", "'decoder'"),
    ({"model.activation": "swigelu"}, "model.activation", "'swiglu'"),
    ({"model.norm": "rms_norm"}, "model.norm", "'rmsnorm'"),
    ({"model.dtype": "bfloat"}, "model.dtype", "'bfloat16'"),
    ({"model.remat": "ful"}, "model.remat", "'full'"),
    ({"optimizer.name": "adamW"}, "optimizer.name", "'adamw'"),
    ({"optimizer.schedule": "cosin"}, "optimizer.schedule", "'cosine'"),
    ({"model.moe.capacity_basis": "token"}, "model.moe.capacity_basis", "'tokens'"),
    ({"model.moe.balance_counts": "top1"}, "model.moe.balance_counts", "'top_1'"),
    ({"model.moe.balance_over": "groups"}, "model.moe.balance_over", "'group'"),
    ({"model.moe.layer_reduce": "avg"}, "model.moe.layer_reduce", "mean, sum"),
    ({"model.moe.capacity_rounding": "floor"}, "model.moe.capacity_rounding", "nearest, down, up"),
    ({"model.moe.gate_network": "mlp"}, "model.moe.gate_network", "linear, tanh"),
    ({"model.moe.jitter_on": "inputs"}, "model.moe.jitter_on", "'input'"),
    ({"model.moe.balance_scores": "sigmoids"}, "model.moe.balance_scores", "'sigmoid'"),
    ({"model.moe.importance_of": "gate"}, "model.moe.importance_of", "'gates'"),
    ({"model.moe.replay_gate": "store"}, "model.moe.replay_gate", "'stored'"),
    ({"optimizer.freeze": (1,)}, "optimizer.freeze", "'router'"),
    ({"model.moe.devices": 3}, "model.moe.devices", "num_experts=8"),
    ({"model.moe.device_loss": 0.1}, "model.moe.device_loss", "devices=1"),
    ({f"{R}.name": "device_limited", f"{R}.device_limited.k": 2, "model.moe.communication_loss": 0.1,
      "model.moe.devices": 4}, "model.moe.devices", "groups=8"),
    ({"model.moe.threshold_loss": 1.0}, "model.moe.threshold_loss", "strictly_balanced"),
    ({f"{R}.name": "hash_layer", "model.moe.bias_update_rate": 0.1}, "model.moe.bias_update_rate", "sigmoid_bias"),
    ({f"{R}.name": "noisy_top_k", f"{R}.noisy_top_k.k": 1}, f"{R}.noisy_top_k.k", "constant 1"),
    ({f"{R}.name": "sigmoid_bias", f"{R}.sigmoid_bias.k": 1}, f"{R}.sigmoid_bias.gate_norm", "'none'"),
    ({f"{R}.name": "hierarchical", f"{R}.hierarchical.groups": 3}, f"{R}.hierarchical.groups", "num_experts=8"),
    ({"model.moe.soft_slots": 2}, "model.moe.soft_slots", "allow_noncausal_routing"),
    ({"model.moe.routed_scale": 0.0}, "model.moe.routed_scale", "above 0"),
    ({"data.pipeline": "window"}, "data.pipeline", "'windows'"),
    ({"data.sources": (1, "embedded:prose")}, "data.sources", "1 in it must be a string"),
    ({"data.weights": ("a", 1.0)}, "data.weights", "'a' in it must be a number"),
    ({f"{R}.top_k.k": 9}, f"{R}.top_k.k", "num_experts=8"),
    ({f"{R}.top_k.k": 0}, f"{R}.top_k.k", "between 1"),
    ({f"{R}.top_k.k": 2.0}, f"{R}.top_k.k", "type int"),
    ({f"{R}.top_k.kk": 2}, f"{R}.top_k.kk", "did you mean 'k'"),
    ({f"{R}.top_k.gate_norm": "topk"}, f"{R}.top_k.gate_norm", "top_k"),
    ({f"{R}.top_k.priority": "gates"}, f"{R}.top_k.priority", "gate"),
    ({f"{R}.top_k.k": 1}, f"{R}.top_k.gate_norm", "'none'"),
    ({f"{R}.top_k.priority": "gate"}, f"{R}.name", "allow_noncausal_routing"),
    ({f"{R}.name": "expert_choice"}, f"{R}.name", "allow_noncausal_routing"),
    ({f"{R}.name": "expert_choice", f"{R}.expert_choice.capacity_factor": -1.0},
     f"{R}.expert_choice.capacity_factor", "> 0"),
    ({"model.num_kv_heads": 3}, "model.num_kv_heads", "num_heads=4"),
    ({"model.head_dim": 31}, "model.head_dim", "even"),
    ({"model.d_model": 0}, "model.d_model", "at least 1"),
    ({"model.num_layers": -2}, "model.num_layers", "at least 1"),
    ({"model.dropout": 1.0}, "model.dropout", "below 1"),
    ({"model.moe.jitter": -0.1}, "model.moe.jitter", "at least 0"),
    ({"model.moe.capacity_factor": 0.0}, "model.moe.capacity_factor", "above 0"),
    ({"model.moe.eval_capacity_factor": -1.0}, "model.moe.eval_capacity_factor", "above 0"),
    ({"model.moe.balance_loss": -0.01}, "model.moe.balance_loss", "at least 0"),
    ({"model.moe.z_loss": float("nan")}, "model.moe.z_loss", "at least 0"),
    ({"model.moe.first": 4}, "model.moe.first", "num_experts=0"),
    ({"model.moe.group_size": 100}, "model.moe.group_size", "8192 tokens"),
    ({"train.steps": 0}, "train.steps", "at least 1"),
    ({"train.accumulate_steps": 5}, "train.accumulate_steps", "batch_size=32"),
    ({"train.batch_size": 12}, "train.batch_size", "data=8"),
    ({"optimizer.learning_rate": -1.0}, "optimizer.learning_rate", "positive"),
    ({"mesh.data": 16}, "mesh", "data=8"),
    ({"mesh.data": 1, "mesh.expert": 8, "model.moe.num_experts": 12}, "mesh.expert", "num_experts=12"),
    ({"mesh.data": 1, "mesh.tensor": 8}, "mesh.tensor", "num_heads=4"),
    ({"mesh.expert": 2, "model.moe.num_experts": 0}, "mesh.expert", "dense"),
]


@pytest.mark.parametrize("changes, field, words", WRONG,
                         ids=[" ".join(f"{k}={v}" for k, v in wrong[0].items()) for wrong in WRONG])
def test_mistakes_are_refused_by_name(changes, field, words):
  # Catches: each check removed; a remedy that does not say what would be right.
  with pytest.raises(ConfigError) as error:
    build.validate(config(changes), 8)
  assert error.value.field == field and words in str(error.value)
  assert "\n" not in str(error.value) and repr(error.value.value) in str(error.value)


def test_dense_models_need_no_experts_to_be_right():
  # Catches: keys of experts that a dense model trips over.
  build.validate(config({"model.moe.num_experts": 0, "model.moe.first": 99, f"{R}.top_k.k": 99}), 8)


def test_noncausal_routing_on_demand():
  # Catches: a refusal that cannot be overruled.
  build.validate(config({f"{R}.name": "expert_choice", "model.moe.allow_noncausal_routing": True}))
