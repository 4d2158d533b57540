"""Compares the architecture and losses of each family's config with published code and papers.

The values here are copied from the sources that the comments name and not from the configs. Sizes
are tested in papers_test.py, and routing in routing/ and published/.
"""

import functools

import pytest

pytestmark = pytest.mark.unit

# The values of all rows that do not override them. Queries, keys and values have no biases, norms
# or clipping, and there is no sliding window.
COMMON = {
  "model.family": "decoder",
  "model.attention": "grouped_query",
  "model.qkv_bias": False,
  "model.qk_norm": False,
  "model.clip_qkv": 0.0,
  "model.sliding_window": 0,
  "model.query_scale": 0.0,
  "model.ffn_bias": "none",
  "model.dropout": 0.0,
  "model.relative_shared": False,
}
# The released configurations of decoders have a gated hidden_act silu, attention_bias false and
# tie_word_embeddings false. In their code there is nothing between the embedding and the first
# layer.
OPEN = COMMON | {
  "model.position": "rope",
  "model.activation": "swiglu",
  "model.norm": "rmsnorm",
  "model.embed_scale": False,
  "model.tied_embeddings": False,
  "train.output_z_loss": 0.0,
}
# T5 1.1 in T5X and flaxformer: `shared_relative_position_bias_factory` in encoder and decoder, 32
# buckets up to 128, T5LayerNorm's epsilon 1e-6, embeddings of standard deviation 1, no factor on
# queries, and Z_LOSS = 0.0001.
T5 = COMMON | {
  "model.family": "encoder_decoder",
  "model.position": "relative",
  "model.relative_shared": True,
  "model.relative_buckets": 32,
  "model.relative_max_distance": 128,
  "model.norm": "rmsnorm",
  "model.norm_eps": 1e-6,
  "model.embed_scale": False,
  "model.query_scale": 1.0,
  "train.output_z_loss": 1e-4,
  "optimizer.name": "adafactor",
  "optimizer.weight_decay": 0.0,
}
# The paper has a relative bias per layer, gated GELU in dense FFNs, and no dropout. Lingvo's
# DenseLmTemplate has 32 buckets up to 128, one embedding, and z_loss 1e-4. It divides the logits by
# the factor by which the rows of the embedding are multiplied here.
GLAM = COMMON | {
  "model.position": "relative",
  "model.relative_buckets": 32,
  "model.relative_max_distance": 128,
  "model.activation": "geglu",
  "model.moe.activation": "gelu",
  "model.norm": "rmsnorm",
  "model.norm_eps": 1e-6,
  "model.embed_scale": True,
  "model.tied_embeddings": True,
  "train.output_z_loss": 1e-4,
  "optimizer.name": "adafactor",
  "optimizer.weight_decay": 0.0,
}
TABLE = {
  # mistralai/Mixtral-8x7B-v0.1/config.json: rope_theta 1e6, rms_norm_eps 1e-5, sliding_window null.
  "mixtral:8x7b": OPEN | {"model.rope_theta": 1e6, "model.norm_eps": 1e-5},
  "mixtral:8x22b": OPEN | {"model.rope_theta": 1e6, "model.norm_eps": 1e-5},
  # Qwen/Qwen1.5-MoE-A2.7B/config.json. The biases on q, k and v and the gate of the shared expert
  # are in its code.
  "qwen1_5_moe:a2_7b": OPEN
  | {
    "model.rope_theta": 1e6,
    "model.norm_eps": 1e-6,
    "model.qkv_bias": True,
    "model.moe.shared_gate": True,
  },
  # allenai/OLMoE-1B-7B-0924/config.json: clip_qkv null. Its q_norm and k_norm use rms_norm_eps,
  # too.
  "olmoe:1b_7b": OPEN | {"model.rope_theta": 1e4, "model.norm_eps": 1e-5, "model.qk_norm": True},
  # databricks/dbrx-base/config.json: clip_qkv 8, rope_theta 5e5. The norm is
  # nn.LayerNorm(bias=False), whose eps is 1e-5.
  "dbrx:132b": OPEN
  | {
    "model.rope_theta": 5e5,
    "model.norm": "layernorm",
    "model.norm_eps": 1e-5,
    "model.clip_qkv": 8.0,
  },
  # The config.json of deepseek-ai/deepseek-moe-16b-base, DeepSeek-V2, DeepSeek-V2-Lite and
  # DeepSeek-V3.
  "deepseek_moe:16b": OPEN
  | {"model.rope_theta": 1e4, "model.norm_eps": 1e-6, "model.moe.shared_gate": False},
  "deepseek_v2:236b": OPEN
  | {"model.attention": "latent", "model.rope_theta": 1e4, "model.norm_eps": 1e-6},
  "deepseek_v2:lite": OPEN
  | {"model.attention": "latent", "model.rope_theta": 1e4, "model.norm_eps": 1e-6},
  "deepseek_v3:671b": OPEN
  | {"model.attention": "latent", "model.rope_theta": 1e4, "model.norm_eps": 1e-6},
  # meta-llama/Llama-2-7b-hf and llama-moe/LLaMA-MoE-v1-*: rms_norm_eps 1e-5 (LLaMA 1 had
  # 1e-6).
  "llama_moe:3_5b_4_16": OPEN | {"model.rope_theta": 1e4, "model.norm_eps": 1e-5},
  "llama:2_7b": OPEN | {"model.rope_theta": 1e4, "model.norm_eps": 1e-5, "model.qkv_bias": False},
  "llama:3_8b": OPEN | {"model.rope_theta": 5e5, "model.norm_eps": 1e-5, "model.num_kv_heads": 8},
  # Qwen/Qwen2-7B/config.json; the biases are in its code.
  "qwen2:7b": OPEN | {"model.rope_theta": 1e6, "model.norm_eps": 1e-6, "model.qkv_bias": True},
  # openai/gpt-oss-20b/config.json, and GptOssConfig of transformers: biases on all projections,
  # sliding and full layers in turn, YaRN from 4096 tokens on.
  "gpt_oss:20b": OPEN
  | {
    "model.activation": "clamped_swiglu",
    "model.rope_theta": 150_000.0,
    "model.norm_eps": 1e-5,
    "model.qkv_bias": True,
    "model.output_bias": True,
    "model.sinks": True,
    "model.sliding_window": 128,
    "model.global_every": 2,
    "model.moe.expert_bias": True,
  },
  # Qwen/Qwen3-30B-A3B/config.json; the norms of head_dim features are in its code.
  "qwen3_moe:30b_a3b": OPEN
  | {
    "model.rope_theta": 1e6,
    "model.norm_eps": 1e-6,
    "model.qk_norm": True,
    "model.qk_norm_over": "head",
  },
  # Llama4TextConfig of transformers, whose defaults are Scout's: no_rope_layer_interval 4.
  "llama4:scout": OPEN
  | {
    "model.rope_theta": 5e5,
    "model.norm_eps": 1e-5,
    "model.global_every": 4,
    "model.global_positions": False,
  },
  # moonshotai/Kimi-K2-Instruct/config.json.
  "kimi_k2:1t": OPEN
  | {
    "model.attention": "latent",
    "model.rope_theta": 5e4,
    "model.norm_eps": 1e-6,
    "model.moe.routed_scale": 2.827,
  },
  # zai-org/GLM-4.5/config.json: attention_bias true, of which its code has none on the output
  # projection; use_qk_norm true; partial_rotary_factor 0.5 of heads of 128.
  "glm_4_5:355b": OPEN
  | {
    "model.rope_theta": 1e6,
    "model.norm_eps": 1e-5,
    "model.qkv_bias": True,
    "model.qk_norm": True,
    "model.qk_norm_over": "head",
    "model.rotary_dim": 64,
    "model.moe.routed_scale": 2.5,
  },
  # LongcatFlashConfig of transformers.
  "longcat_flash:560b": OPEN
  | {"model.attention": "latent", "model.rope_theta": 1e7, "model.norm_eps": 1e-5},
  # T5 in Mesh-TensorFlow and T5X. The FFN and the tied embeddings are those of Switch's Table 9
  # where its parameter counts fit, see configs/t5.py.
  "t5:base": T5 | {"model.activation": "relu", "model.tied_embeddings": True},
  "t5:xxl": T5 | {"model.activation": "geglu", "model.tied_embeddings": False},
  # flaxformer, t5x/configs/moe/models/switch_classic_base.gin: activations ('relu',),
  # output_logits_factory None.
  "switch:base_128e": T5 | {"model.activation": "relu", "model.tied_embeddings": True},
  "switch:xxl_128e": T5 | {"model.activation": "geglu", "model.tied_embeddings": False},
  # flaxformer, st_moe_base.gin and st_moe_32b.gin: activations ('gelu', 'linear'), a head that is
  # not tied to the embedding, extra_mlp.
  "st_moe:32b": T5
  | {
    "model.activation": "geglu",
    "model.tied_embeddings": False,
    "model.moe.extra_ffn": True,
    "model.moe.z_loss": 1e-3,
  },
  # Paper, A.2: ReLU, dropout 0.1. Lingvo's gshard_builder: relative_attention_type 'bias', which
  # means a relative bias per layer.
  "gshard:600b": T5
  | {
    "model.activation": "relu",
    "model.tied_embeddings": True,
    "model.dropout": 0.1,
    "model.relative_shared": False,
    "model.query_scale": 0.0,
    "train.output_z_loss": 0.0,
  },
  "glam:64b_64e": GLAM,
  "expert_choice:8b_64e": GLAM,
  # A GLaM, by the paper.
  "lifelong_moe:0_1b_16e": GLAM,
  "brainformer:100m_32e": GLAM | {"model.family": "brainformer"},
  # Shazeer et al. 2017, appendix C: dropout 0.1, ReLU experts, a softmax that is not tied to the
  # embedding, and no norms.
  "lstm_moe:moe_256": {
    "model.family": "lstm",
    "model.dropout": 0.1,
    "model.activation": "relu",
    "model.tied_embeddings": False,
    "train.output_z_loss": 0.0,
  },
}


@functools.cache
def flat(name):
  """Returns the values of a config by dotted key."""
  # Imported here because jaxtyping's import hook must come first.
  from moe_jax.commands import load_config

  values, sections = {}, [("", load_config(f"configs/{name.replace(':', '.py:')}").to_dict())]
  # The list grows while it is read, by the sections within each section.
  for prefix, section in sections:
    for key, value in section.items():
      if isinstance(value, dict):
        sections.append((f"{prefix}{key}.", value))
      else:
        values[prefix + key] = value
  return values


@pytest.mark.parametrize("name", TABLE)
def test_a_family_is_as_published(name):
  # Catches a default of base.py that a family should override, such as scaled embeddings, another
  # epsilon, a table of relative biases per layer, or a missing output z-loss.
  assert {key: flat(name)[key] for key in TABLE[name]} == TABLE[name]


def test_every_family_is_in_the_table():
  # Catches a family that has not been compared with its source.
  from configs_test import FAMILIES

  assert {name.partition(":")[0] for name in TABLE} == set(FAMILIES)


def test_gelu_is_the_tanh_form():
  # Lingvo uses tf.nn.gelu(x, approximate=True), and flaxformer uses jax.nn.gelu, whose default is
  # the tanh form.
  # Catches the erf form.
  import jax.numpy as jnp
  import numpy as np

  from moe_jax.experts import ACTIVATIONS

  x = np.asarray([-2.0, 0.5, 3.0], np.float32)
  tanh = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
  np.testing.assert_allclose(ACTIVATIONS["gelu"](jnp.asarray(x)), tanh, atol=1e-6)
