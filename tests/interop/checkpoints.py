"""Tiny published checkpoints, written by hand: names and shapes as transformers writes them."""

import json

import numpy as np
from safetensors.numpy import save_file

# Widths: model D, heads H of width P, key-value heads K, FFN F, experts E of width M, vocabulary V.
D, H, P, K, F, E, M, V, LAYERS = 16, 4, 4, 2, 24, 4, 8, 320, 3
COMMON = {
  "hidden_size": D,
  "num_hidden_layers": LAYERS,
  "num_attention_heads": H,
  "num_key_value_heads": K,
  "vocab_size": V,
  "hidden_act": "silu",
  "rms_norm_eps": 1e-5,
  "rope_theta": 10000.0,
  "tie_word_embeddings": False,
  "max_position_embeddings": 64,
  "torch_dtype": "float32",
}
CONFIGS = {
  "llama": {"intermediate_size": F},
  "qwen2": {"intermediate_size": F, "use_sliding_window": False, "max_window_layers": 3},
  "mixtral": {"intermediate_size": M, "num_local_experts": E, "num_experts_per_tok": 2},
  "olmoe": {"intermediate_size": M, "num_experts": E, "num_experts_per_tok": 2},
  "qwen2_moe": {
    "intermediate_size": F,
    "num_experts": E,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": M,
    "shared_expert_intermediate_size": 2 * M,
    "decoder_sparse_step": 1,
  },
}
_SPARSE = {
  "intermediate_size": F,
  "moe_intermediate_size": M,
  "n_routed_experts": E,
  "n_shared_experts": 2,
  "num_experts_per_tok": 2,
  "first_k_dense_replace": 1,
  "moe_layer_freq": 1,
}
# Widths of latent attention: latents of keys and values C and of queries B, and features of a head.
C, B, NOPE, ROPE, VALUE = 12, 10, 6, 4, 5
_LATENT = {
  "kv_lora_rank": C,
  "q_lora_rank": B,
  "qk_nope_head_dim": NOPE,
  "qk_rope_head_dim": ROPE,
  "v_head_dim": VALUE,
}
_GROUPS = {"n_group": 2, "topk_group": 1}
CONFIGS |= {
  "deepseek": _SPARSE,
  "deepseek_v2": _SPARSE | _LATENT | _GROUPS | {"topk_method": "group_limited_greedy"},
  "deepseek_v3": _SPARSE
  | _LATENT
  | _GROUPS
  | {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "num_nextn_predict_layers": 1},
}
CONFIGS["llama_moe"] = {
  "intermediate_size": E * M,
  "num_experts": E,
  "num_selects": 2,
  "size_experts": [[M] * E] * LAYERS,
  "score_scale_factor": 2.0,
}
ARCHITECTURES = {
  "llama": "LlamaForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "mixtral": "MixtralForCausalLM",
  "olmoe": "OlmoeForCausalLM",
  "qwen2_moe": "Qwen2MoeForCausalLM",
  "dbrx": "DbrxForCausalLM",
  "deepseek": "DeepseekForCausalLM",
  "deepseek_v2": "DeepseekV2ForCausalLM",
  "deepseek_v3": "DeepseekV3ForCausalLM",
  "llama_moe": "LlamaMoEForCausalLM",
}
T5 = {
  "d_model": D,
  "d_kv": P,
  "d_ff": F,
  "num_heads": H,
  "num_layers": LAYERS,
  "vocab_size": V,
  "is_encoder_decoder": True,
}
# Configs that are not made of `COMMON`. The second layer of each of Switch's stacks has experts.
WHOLE = {
  "t5": T5
  | {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
  },
  "switch_transformers": T5
  | {
    "model_type": "switch_transformers",
    "architectures": ["SwitchTransformersForConditionalGeneration"],
    "num_layers": 2,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    "num_experts": E,
    "expert_capacity": 8,
  },
}
DBRX = {
  "model_type": "dbrx",
  "architectures": ["DbrxForCausalLM"],
  "d_model": D,
  "n_heads": H,
  "n_layers": LAYERS,
  "vocab_size": V,
  "max_seq_len": 64,
  "attn_config": {"kv_n_heads": K, "clip_qkv": 8.0, "rope_theta": 5e5},
  "ffn_config": {"ffn_hidden_size": M, "moe_num_experts": E, "moe_top_k": 2},
}
WHOLE["dbrx"] = DBRX
FAMILIES = (*CONFIGS, *WHOLE)


def config(family, **changes):
  """Returns the config.json of a tiny model, with changes."""
  if family in WHOLE:
    return WHOLE[family] | changes
  named = {"model_type": family, "architectures": [ARCHITECTURES[family]]}
  return COMMON | named | CONFIGS[family] | changes


def _ffn(name, width):
  return {
    f"{name}.gate_proj.weight": (width, D),
    f"{name}.up_proj.weight": (width, D),
    f"{name}.down_proj.weight": (D, width),
  }


def _experts(family, i):
  """Returns the tensors of the FFN of layer i, or of its experts and router."""
  if family in ("llama", "qwen2"):
    return _ffn("mlp", F)
  if family == "mixtral":
    place = "block_sparse_moe."
    found = {f"{place}gate.weight": (E, D)}
    for e in range(E):
      shapes = {"w1": (M, D), "w2": (D, M), "w3": (M, D)}
      found |= {f"{place}experts.{e}.{name}.weight": shape for name, shape in shapes.items()}
    return found
  if family == "llama_moe":
    found = {
      "mlp.gate.gate_network.0.weight": (E, D),
      "mlp.gate.gate_network.2.weight": (E, E),
      "mlp.gate.weight_noise.weight": (E, D),
    }
    for e in range(E):
      for name, shape in {"gate": (M, D), "up": (M, D), "down": (D, M)}.items():
        found[f"mlp.calculator.experts.weight_{name}.{e}"] = shape
    return found
  is_deepseek = family.startswith("deepseek")
  if is_deepseek and i == 0:
    return _ffn("mlp", F)
  found = {"mlp.gate.weight": (E, D)}
  for e in range(E):
    found |= _ffn(f"mlp.experts.{e}", M)
  if family == "qwen2_moe":
    found |= _ffn("mlp.shared_expert", 2 * M) | {"mlp.shared_expert_gate.weight": (1, D)}
  if is_deepseek:
    found |= _ffn("mlp.shared_experts", 2 * M)
  if family == "deepseek_v3":
    found["mlp.gate.e_score_correction_bias"] = (E,)
  return found


def _attention(family):
  """Returns the tensors of a layer's attention."""
  if family in ("deepseek_v2", "deepseek_v3"):
    return {
      "self_attn.q_a_proj.weight": (B, D),
      "self_attn.q_a_layernorm.weight": (B,),
      "self_attn.q_b_proj.weight": (H * (NOPE + ROPE), B),
      "self_attn.kv_a_proj_with_mqa.weight": (C + ROPE, D),
      "self_attn.kv_a_layernorm.weight": (C,),
      "self_attn.kv_b_proj.weight": (H * (NOPE + VALUE), C),
      "self_attn.o_proj.weight": (D, H * VALUE),
    }
  widths = {"q": H * P, "k": K * P, "v": K * P}
  found = {f"self_attn.{name}_proj.weight": (width, D) for name, width in widths.items()}
  found["self_attn.o_proj.weight"] = (D, H * P)
  if family.startswith("qwen2"):
    found |= {f"self_attn.{name}_proj.bias": (width,) for name, width in widths.items()}
  if family == "olmoe":
    found |= {f"self_attn.{name}_norm.weight": (widths[name],) for name in ("q", "k")}
  return found


def _dbrx():
  """Returns the shape of each tensor of DBRX."""
  layer = {
    "norm_attn_norm.norm_1.weight": (D,),
    "norm_attn_norm.norm_2.weight": (D,),
    "norm_attn_norm.attn.Wqkv.weight": ((H + 2 * K) * P, D),
    "norm_attn_norm.attn.out_proj.weight": (D, H * P),
    "ffn.router.layer.weight": (E, D),
  } | {f"ffn.experts.mlp.{name}": (E * M, D) for name in ("w1", "v1", "w2")}
  found = {"transformer.wte.weight": (V, D), "lm_head.weight": (V, D)}
  found["transformer.norm_f.weight"] = (D,)
  for i in range(LAYERS):
    found |= {f"transformer.blocks.{i}.{name}": shape for name, shape in layer.items()}
  return found


def _t5(family):
  """Returns the shape of each tensor of T5 1.1, or of Switch."""
  found = {"shared.weight": (V, D)}
  if family == "t5":
    found["lm_head.weight"] = (V, D)
  for stack, parts in (("encoder", 1), ("decoder", 2)):
    found[f"{stack}.final_layer_norm.weight"] = (D,)
    table = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    found[f"{stack}.{table}"] = (32, H)
    for i in range(WHOLE[family]["num_layers"]):
      place = f"{stack}.block.{i}.layer"
      for j, name in enumerate(("SelfAttention", "EncDecAttention")[:parts]):
        found[f"{place}.{j}.layer_norm.weight"] = (D,)
        for letter in "qkv":
          found[f"{place}.{j}.{name}.{letter}.weight"] = (H * P, D)
        found[f"{place}.{j}.{name}.o.weight"] = (D, H * P)
      found[f"{place}.{parts}.layer_norm.weight"] = (D,)
      if family == "t5":
        ffn = {"DenseReluDense.wi_0": (F, D), "DenseReluDense.wi_1": (F, D)}
        ffn["DenseReluDense.wo"] = (D, F)
      elif i == 1:
        ffn = {"mlp.router.classifier": (E, D)}
        for e in range(E):
          ffn |= {f"mlp.experts.expert_{e}.wi": (F, D), f"mlp.experts.expert_{e}.wo": (D, F)}
      else:
        ffn = {"mlp.wi": (F, D), "mlp.wo": (D, F)}
      found |= {f"{place}.{parts}.{name}.weight": shape for name, shape in ffn.items()}
  return found


def shapes(family):
  """Returns the shape of each tensor."""
  if family in ("t5", "switch_transformers"):
    return _t5(family)
  if family == "dbrx":
    return _dbrx()
  found = {"model.embed_tokens.weight": (V, D), "lm_head.weight": (V, D), "model.norm.weight": (D,)}
  for i in range(LAYERS):
    layer = _attention(family) | _experts(family, i)
    layer |= dict.fromkeys(("input_layernorm.weight", "post_attention_layernorm.weight"), (D,))
    found |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
  return found


def tensors(family, dtype=np.float32):
  """Returns random tensors."""
  draw = np.random.default_rng(0)
  return {n: draw.normal(size=shape).astype(dtype) for n, shape in shapes(family).items()}


def write(folder, values, settings, files=1):
  """Writes a checkpoint into a folder, which is made, in one file or in several with an index."""
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps(settings))
  if files == 1:
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
  weight_map = {}
  for i in range(files):
    name = f"model-{i + 1:05}-of-{files:05}.safetensors"
    part = dict(list(values.items())[i::files])
    save_file(part, folder / name, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(part, name)
  index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  return folder
