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
  "dbrx:132b": {
    "model_type": "dbrx",
    "architectures": ["DbrxForCausalLM"],
    "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "model_type": "", "rope_theta": 500000},
    "d_model": 6144,
    "emb_pdrop": 0.0,
    "ffn_config": {
      "ffn_hidden_size": 10752,
      "model_type": "",
      "moe_loss_weight": 0.05,
      "moe_num_experts": 16,
      "moe_top_k": 4,
    },
    "max_seq_len": 32768,
    "n_heads": 48,
    "n_layers": 40,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 100352,
  },
  "deepseek_moe:16b": {
    "model_type": "deepseek",
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "max_position_embeddings": 4096,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 28,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 102400,
  },
  "deepseek_v2:236b": {
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 1536,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 128,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
      "beta_fast": 32,
      "beta_slow": 1,
      "factor": 40,
      "original_max_position_embeddings": 4096,
      "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 16.0,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 102400,
  },
  "deepseek_v2:lite": {
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
      "beta_fast": 32,
      "beta_slow": 1,
      "factor": 40,
      "mscale": 0.707,
      "mscale_all_dim": 0.707,
      "original_max_position_embeddings": 4096,
      "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 102400,
  },
  "deepseek_v3:671b": {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
      "activation_scheme": "dynamic",
      "fmt": "e4m3",
      "quant_method": "fp8",
      "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
      "beta_fast": 32,
      "beta_slow": 1,
      "factor": 40,
      "mscale": 1.0,
      "mscale_all_dim": 1.0,
      "original_max_position_embeddings": 4096,
      "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
  },
  "llama:2_7b": {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
  },
  "llama:3_8b": {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
  },
  "qwen2:7b": {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152064,
  },
  "qwen2:0_5b": {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 131072,
    "max_window_layers": 24,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
  },
  "t5:base": {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "d_ff": 3072,
    "d_kv": 64,
    "d_model": 768,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "n_positions": 512,
    "num_heads": 12,
    "num_layers": 12,
    "relative_attention_num_buckets": 32,
    "vocab_size": 32128,
  },
  # T5 1.1, XXL.
  "t5:xxl": {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "vocab_size": 32128,
  },
  "switch:base_128e": {
    "model_type": "switch_transformers",
    "architectures": ["SwitchTransformersForConditionalGeneration"],
    "d_ff": 3072,
    "d_kv": 64,
    "d_model": 768,
    "expert_capacity": 64,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "num_decoder_layers": 12,
    "num_experts": 128,
    "num_heads": 12,
    "num_layers": 12,
    "num_sparse_decoder_layers": 6,
    "num_sparse_encoder_layers": 6,
    "relative_attention_num_buckets": 32,
    "vocab_size": 32128,
  },
}
# Keys in which our config of the paper differs from what is released, and why.
# The papers train before YaRN, with which the released models read longer rows.
_YARN = ("model.rope.scaling", "model.rope.factor")
# T5's papers train in bfloat16, and its releases are float32. Hugging Face's Switch counts slots a
# row, where the paper has a share of a group.
_T5 = ("model.dtype",)
EXCEPT: dict[str, tuple[str, ...]] = {
  "t5:base": _T5,
  "t5:xxl": _T5,
  "switch:base_128e": (
    *_T5,
    "model.moe.capacity_factor",
    "model.moe.eval_capacity_factor",
    "model.moe.capacity_slots",
    "model.moe.group_rows",
  ),
  "deepseek_v2:236b": _YARN,
  "deepseek_v2:lite": (*_YARN, "model.rope.attention_factor", "model.rope.score_mscale"),
  "deepseek_v3:671b": (*_YARN, "model.rope.attention_factor", "model.rope.score_mscale"),
}


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
  assert differ.keys() == set(EXCEPT.get(name, ())), differ
  # Nothing that matters is left at a default: the whole section agrees, but for how it is computed.
  published = hugging_face.Published(None, family, RELEASED[name], found)
  theirs = dict(hugging_face._flat(hugging_face.config_of(published).to_dict()))
  free = ("model.remat", "model.moe.dispatcher", *EXCEPT.get(name, ()))
  if not found["model.moe.num_experts"]:
    # Nobody reads the options of a dense model's experts.
    free = (*free, "model.moe.")
  differ = {
    key: (theirs[key], value)
    for key, value in ours.items()
    if key.startswith("model.") and not key.startswith(free) and theirs[key] != value
  }
  assert not differ


@pytest.mark.parametrize("kind", ["old", "new"])
@pytest.mark.parametrize(
  "scaling, values",
  [
    ({"rope_type": "linear", "factor": 2.0}, {"factor": 2.0}),
    (
      {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
      },
      {"factor": 8.0, "high_freq_factor": 4.0, "original_length": 8192},
    ),
    (
      {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
      {"factor": 4.0, "original_length": 32, "beta_fast": 32.0, "attention_factor": 0.0},
    ),
  ],
)
def test_scaled_rotary_embeddings(scaling, values, kind):
  # Catches a form of the settings that is read as no scaling at all, and a scaling that is written
  # as another one.
  if kind == "new":
    changes = {"rope_parameters": scaling | {"rope_theta": 7.0}, "rope_theta": None}
  else:
    changes = {"rope_scaling": scaling, "rope_theta": 7.0}
  family, found = hugging_face.keys(checkpoints.config("llama", **changes))
  wanted = {"scaling": scaling["rope_type"]} | values
  assert found["model.rope_theta"] == 7.0
  assert {name: found[f"model.rope.{name}"] for name in wanted} == wanted
  config = hugging_face.config_of(hugging_face.Published(None, family, {}, found))
  written = family.settings(config.model)
  assert hugging_face.keys({"model_type": "llama"} | written)[1] == found


@pytest.mark.parametrize("name", [name for name in RELEASED if not name.startswith("switch")])
def test_settings_are_the_inverse_of_keys(name):
  # Catches a setting that is written with another meaning than it is read with, and a model that is
  # taken for one of another family.
  config = paper_config(name)
  family, settings = hugging_face.settings_of(config, {})
  assert hugging_face.different(config, hugging_face.keys(settings)[1]) == []
  assert settings["model_type"] == family.MODEL_TYPE == RELEASED[name]["model_type"]


@pytest.mark.parametrize("model_type", checkpoints.FAMILIES)
def test_tensors_are_those_of_transformers(model_type):
  # Catches a name or a shape that the family does not have. Those here are written by hand.
  family, keys = hugging_face.keys(checkpoints.config(model_type))
  published = hugging_face.Published(None, family, {}, keys)
  config = hugging_face.config_of(published)
  bridge = Bridge(family, config, make_mesh({"data": 1}))
  shapes = {binding.theirs: bridge.their_shape(binding) for binding in bridge.bound}
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


@pytest.mark.parametrize(
  "key, value",
  [
    ("qk_norm_over", "head"),
    ("global_every", 2),
    ("rotary_dim", 64),
    ("sinks", True),
    ("moe.expert_bias", True),
    ("moe.latent_width", 64),
    ("moe.logit_softcap", 5.0),
    ("moe.gate_on", "input"),
    ("moe.gate_residual", True),
  ],
)
def test_options_that_no_family_has_are_not_written(key, value):
  # Catches a model that is written as one that computes something else.
  from moe_jax.commands import load_config

  config = load_config("configs/mixtral.py:8x7b")
  with config.ignore_type():
    config.model.update_from_flattened_dict({key: value})
  with pytest.raises(ConfigError, match=f"mixtral has model.{key}="):
    hugging_face.settings_of(config, {})
