"""Tests that released settings are those of our configs, and which tensors each family has."""

import importlib

import pytest
from interop import checkpoints

from moe_jax.errors import ConfigError
from moe_jax.interop import families, hugging_face
from moe_jax.interop.weights import Bridge
from moe_jax.sharding import make_mesh

pytestmark = pytest.mark.unit

# What the released config.json says, without what only software and generation read. Values that we
# are not sure of are left out.
RELEASED = {
  "mixtral:8x7b": {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
  },
  "mixtral:8x22b_hf": {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "max_position_embeddings": 65536,
    "num_attention_heads": 48,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 56,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
  },
  "olmoe:1b_7b": {
    "model_type": "olmoe",
    "architectures": ["OlmoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 50304,
  },
  "qwen1_5_moe:a2_7b": {
    "model_type": "qwen2_moe",
    "architectures": ["Qwen2MoeForCausalLM"],
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
  },
}
# Keys in which our config of the paper differs from what is released, and why.
EXCEPT: dict[str, dict[str, str]] = {}


def paper_config(name):
  family, _, variant = name.partition(":")
  return importlib.import_module(f"configs.{family}").get_config(variant)


@pytest.mark.parametrize("name", RELEASED)
def test_released_settings_are_those_of_our_config(name):
  # Catches a config of a paper that is not what was released, and a setting that is mapped to the
  # wrong key.
  family, found = hugging_face.keys(RELEASED[name])
  ours = dict(hugging_face._flat(paper_config(name).to_dict()))
  differ = {key: (value, ours[key]) for key, value in found.items() if ours[key] != value}
  assert differ.keys() == EXCEPT.get(name, {}).keys(), differ
  # Nothing that matters is left at a default: the whole section agrees, but for how it is computed.
  published = hugging_face.Published(None, family, RELEASED[name], found)
  theirs = dict(hugging_face._flat(hugging_face.config_of(published).to_dict()))
  free = ("model.remat", "model.moe.dispatcher", *EXCEPT.get(name, {}))
  differ = {
    key: (theirs[key], value)
    for key, value in ours.items()
    if key.startswith("model.") and not key.startswith(free) and theirs[key] != value
  }
  assert not differ


@pytest.mark.parametrize("name", RELEASED)
def test_settings_are_the_inverse_of_keys(name):
  # Catches a setting that is written with another meaning than it is read with.
  config = paper_config(name)
  family, settings = hugging_face.settings_of(config, {"model_type": RELEASED[name]["model_type"]})
  assert hugging_face.different(config, hugging_face.keys(settings)[1]) == []
  assert settings["model_type"] == family.MODEL_TYPE


@pytest.mark.parametrize("model_type", checkpoints.CONFIGS)
def test_tensors_are_those_of_transformers(model_type):
  # Catches a name or a shape that the family does not have. Those here are written by hand.
  family, keys = hugging_face.keys(checkpoints.config(model_type))
  published = hugging_face.Published(None, family, {}, keys)
  config = hugging_face.config_of(published)
  bridge = Bridge(family, config, make_mesh({"data": 1}))
  shapes = {binding.theirs: bridge._their_shape(binding) for binding in bridge.bound}
  assert shapes == checkpoints.shapes(model_type)


def test_every_family_has_the_same_parts():
  # Catches a module that is named otherwise than its `model_type`, by which it is found.
  for name in families.FAMILIES:
    family = families.find(name)
    assert family.MODEL_TYPE == name and family.ARCHITECTURE and callable(family.rows)
    assert family.__doc__


def test_layers_with_and_without_a_window_are_refused():
  # Catches a model whose windows are all taken for the same.
  settings = checkpoints.config(
    "qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1
  )
  with pytest.raises(ConfigError, match="layers with a sliding window beside layers without one"):
    hugging_face.keys(settings)
  found = hugging_face.keys(settings | {"max_window_layers": 0})[1]
  assert found["model.sliding_window"] == 8
