"""A wrong config is refused in a sentence that names the field, the value and a remedy."""

import pytest
from changed import config

from moe_jax import assembly
from moe_jax.errors import ConfigError, shown

pytestmark = pytest.mark.unit


def test_the_base_config_is_valid():
  # Catches a check that refuses the default config.
  for devices in (None, 1, 2, 8):
    assembly.validate(config(), devices)


R, W = "model.moe.router", "model.moe.dispatcher"
SPANS = {"model.family": "encoder_decoder", "data.objective": "span_corruption"}
T5 = {"model.family": "encoder_decoder", "data.objective": "span_corruption"}
BRAIN = {"model.family": "brainformer", "model.block": ("attention", "moe")}
# Each entry has changes of the base config, the field that the error names, and words of the
# remedy.
WRONG = [
  ({f"{R}.name": "swich"}, f"{R}.name", "known: adaptive_mixture, "),
  ({f"{R}.name": "expert_choise"}, f"{R}.name", "did you mean 'expert_choice'"),
  ({f"{W}.name": "groupd"}, f"{W}.name", "did you mean 'grouped'"),
  ({"data.dynamic.every": 200}, "data.dynamic.references", "one loss for each of the 3"),
  (
    {"data.dynamic.every": 100, "data.dynamic.references": (1.0, 1.0, 1.0)},
    "data.dynamic.every",
    "train.eval_every=200",
  ),
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
  ({"model.moe.router_dtype": "float16"}, "model.moe.router_dtype", "'bfloat16'"),
  ({"model.moe.encoder_priority": "gate"}, "model.moe.encoder_priority", "encoder_decoder"),
  (
    SPANS | {"model.moe.encoder_priority": "gates"},
    "model.moe.encoder_priority",
    "did you mean 'gate'",
  ),
  (
    SPANS | {f"{R}.name": "gshard", "model.moe.encoder_priority": "gate"},
    "model.moe.encoder_priority",
    "`priority`",
  ),
  ({"model.moe.replay_gate": "store"}, "model.moe.replay_gate", "'stored'"),
  ({"optimizer.freeze": ("ruoter",)}, "optimizer.freeze", "did you mean 'router'"),
  ({"model.moe.shared_gate": True}, "model.moe.shared_gate", "num_shared_experts"),
  ({"model.moe.router_norm": "rmsnorm"}, "model.moe.router_norm", "did you mean 'rms'"),
  ({"model.moe.logit_softcap": -1.0}, "model.moe.logit_softcap", "at least 0"),
  ({"model.moe.logit_scale": 0.0}, "model.moe.logit_scale", "above 0"),
  ({"model.moe.gate_on": "inputs"}, "model.moe.gate_on", "did you mean 'input'"),
  (
    {
      "model.moe.soft_slots": 2,
      "model.moe.allow_noncausal_routing": True,
      "model.moe.router_bias": True,
    },
    "model.moe.router_bias",
    "Soft MoE",
  ),
  (
    {
      "model.moe.soft_slots": 2,
      "model.moe.allow_noncausal_routing": True,
      "model.moe.balancing.rule": "sign",
      "model.moe.balancing.rate": 0.1,
    },
    "model.moe.balancing.rule",
    "Soft MoE",
  ),
  ({"optimizer.freeze": (1,)}, "optimizer.freeze", "'router'"),
  ({"model.moe.devices": 3}, "model.moe.devices", "num_experts=8"),
  ({"model.moe.device_loss": 0.1}, "model.moe.device_loss", "devices=1"),
  (
    {
      f"{R}.name": "device_limited",
      f"{R}.device_limited.k": 2,
      "model.moe.communication_loss": 0.1,
      "model.moe.devices": 4,
    },
    "model.moe.devices",
    "groups=8",
  ),
  ({"model.moe.threshold_loss": 1.0}, "model.moe.threshold_loss", "strictly_balanced"),
  (
    {
      f"{R}.name": "hash_layer",
      "model.moe.balancing.rule": "sign",
      "model.moe.balancing.rate": 0.1,
    },
    "model.moe.balancing.rule",
    "sigmoid_bias",
  ),
  ({f"{R}.name": "noisy_top_k", f"{R}.noisy_top_k.k": 1}, f"{R}.noisy_top_k.k", "constant 1"),
  (
    {f"{R}.name": "sigmoid_bias", f"{R}.sigmoid_bias.k": 1},
    f"{R}.sigmoid_bias.gate_norm",
    "'none'",
  ),
  (
    {f"{R}.name": "hierarchical", f"{R}.hierarchical.groups": 3},
    f"{R}.hierarchical.groups",
    "num_experts=8",
  ),
  ({"model.moe.soft_slots": 2}, "model.moe.soft_slots", "allow_noncausal_routing"),
  ({"model.moe.routed_scale": 0.0}, "model.moe.routed_scale", "above 0"),
  ({"data.pipeline": "window"}, "data.pipeline", "'windows'"),
  ({"data.sources": (1, "embedded:prose")}, "data.sources", "1 in it must be a string"),
  ({"data.weights": ("a", 1.0)}, "data.weights", "'a' in it must be a number"),
  ({f"{R}.top_k.k": 9}, f"{R}.top_k.k", "num_experts=8"),
  ({f"{R}.top_k.k": 0}, f"{R}.top_k.k", "at least 1"),
  ({f"{R}.top_k.k": 2.0}, f"{R}.top_k.k", "whole number"),
  ({f"{R}.top_k.kk": 2}, f"{R}.top_k.kk", "did you mean 'k'"),
  ({f"{R}.top_k.gate_norm": "topk"}, f"{R}.top_k.gate_norm", "top_k"),
  ({f"{R}.top_k.priority": "gates"}, f"{R}.top_k.priority", "gate"),
  ({f"{R}.top_k.k": 1}, f"{R}.top_k.gate_norm", "'none'"),
  ({f"{R}.top_k.priority": "gate"}, f"{R}.name", "allow_noncausal_routing"),
  ({f"{R}.name": "expert_choice"}, f"{R}.name", "allow_noncausal_routing"),
  (
    {f"{R}.name": "expert_choice", f"{R}.expert_choice.capacity_factor": -1.0},
    f"{R}.expert_choice.capacity_factor",
    "above 0",
  ),
  ({"model.num_kv_heads": 3}, "model.num_kv_heads", "num_heads=4"),
  ({"model.head_dim": 31}, "model.head_dim", "even"),
  ({"model.attention": "latnet"}, "model.attention", "'latent'"),
  ({"model.position": "rotary"}, "model.position", "rope, relative, none"),
  ({"model.ffn_bias": "add"}, "model.ffn_bias", "none, additive, multiplicative"),
  ({"model.moe.activation": "swigelu"}, "model.moe.activation", "'swiglu'"),
  ({"model.relative_buckets": 30}, "model.relative_buckets", "multiple of 4"),
  ({"model.relative_buckets": 0}, "model.relative_buckets", "at least 4"),
  (
    {"model.relative_max_distance": 16},
    "model.relative_max_distance",
    "above 16, half of relative_buckets=32",
  ),
  ({"model.norm_eps": 0.0}, "model.norm_eps", "at least 1e-12 and below 0.1"),
  ({"model.norm_eps": 0.1}, "model.norm_eps", "at least 1e-12 and below 0.1"),
  ({"model.norm_eps": float("nan")}, "model.norm_eps", "at least 1e-12 and below 0.1"),
  ({"model.relative_shared": True}, "model.relative_shared", "position='relative'"),
  (
    {"model.relative_shared": True, "model.family": "lstm", "model.position": "relative"},
    "model.relative_shared",
    "must be False",
  ),
  (
    BRAIN | {"model.relative_shared": True, "model.position": "relative"},
    "model.relative_shared",
    "must be False",
  ),
  ({"model.clip_qkv": -8.0}, "model.clip_qkv", "at least 0"),
  ({"model.sliding_window": -1}, "model.sliding_window", "at least 0"),
  ({"model.query_scale": -1.0}, "model.query_scale", "at least 0"),
  ({"model.num_encoder_layers": -1}, "model.num_encoder_layers", "at least 0"),
  ({"model.latent.kv_rank": 0}, "model.latent.kv_rank", "at least 1"),
  ({"model.latent.query_rank": -1}, "model.latent.query_rank", "at least 0"),
  ({**SPANS, "model.sliding_window": 8}, "model.sliding_window", "causal"),
  ({**SPANS, "model.attention": "latent"}, "model.family", "'decoder'"),
  ({"model.attention": "latent", "model.latent.rope_dim": 3}, "model.latent.rope_dim", "even"),
  ({"model.attention": "latent", "model.position": "relative"}, "model.position", "'rope'"),
  ({"model.attention": "latent", "model.position": "none"}, "model.position", "'rope'"),
  ({"model.moe.latent_width": 8, "model.moe.soft_slots": 1}, "model.moe.latent_width", "Soft MoE"),
  (
    {"model.moe.latent_width": 9, "mesh.fsdp": 2, "mesh.data": 1},
    "mesh.fsdp",
    "must divide model.moe.latent_width=9",
  ),
  (
    {"model.moe.gate_network": "product_keys", "model.moe.num_experts": 8},
    "model.moe.gate_network",
    "nearest are 4 and 9",
  ),
  ({**SPANS, "model.moe.gate_residual": True}, "model.moe.gate_residual", "family='decoder'"),
  ({"model.moe.hash_layers": 1}, "model.moe.hash_layers", "scored_top_k"),
  (
    {"model.moe.hash_layers": 3, "model.moe.router.name": "scored_top_k"},
    "model.moe.hash_layers",
    "only 2 layers",
  ),
  ({"model.rotary_dim": 3}, "model.rotary_dim", "even"),
  ({"model.rotary_dim": 64}, "model.rotary_dim", "up to head_dim"),
  ({"model.rotary_dim": 8, "model.position": "none"}, "model.rotary_dim", "position='rope'"),
  ({**SPANS, "model.global_every": 2}, "model.global_every", "family='decoder'"),
  ({"model.attention": "latent", "model.global_every": 2}, "model.global_every", "grouped_query"),
  ({"model.attention": "latent", "model.sinks": True}, "model.sinks", "'grouped_query'"),
  ({"model.global_positions": False}, "model.global_positions", "set global_every"),
  ({"model.moe.dense_layers": (99,)}, "model.moe.dense_layers", "there are only"),
  ({"model.attention": "latent", "model.qkv_bias": True}, "model.qkv_bias", "'grouped_query'"),
  ({"model.attention": "latent", "model.qk_norm": True}, "model.qk_norm", "'grouped_query'"),
  ({"model.attention": "latent", "model.clip_qkv": 8.0}, "model.clip_qkv", "'grouped_query'"),
  (
    {"model.attention": "latent", "model.sliding_window": 8},
    "model.sliding_window",
    "'grouped_query'",
  ),
  ({"model.attention": "latent", "model.query_scale": 1.0}, "model.query_scale", "'grouped_query'"),
  (
    {"model.attention": "latent", "model.output_bias": True},
    "model.output_bias",
    "'grouped_query'",
  ),
  (
    {"model.rope.scaling": "yarn", "model.position": "none"},
    "model.rope.scaling",
    "must be 'none'",
  ),
  (
    {"model.rope.scaling": "llama3", "model.rope.high_freq_factor": 1.0},
    "model.rope.high_freq_factor",
    "above low_freq_factor=1",
  ),
  (
    {"model.rope.scaling": "yarn", "model.rope.beta_slow": 32.0},
    "model.rope.beta_fast",
    "above beta_slow=32",
  ),
  (
    {"model.rope.scaling": "yarn", "model.rope.score_mscale": 1.0},
    "model.rope.score_mscale",
    "latent",
  ),
  ({"model.attention": "latent", "mesh.data": 1, "mesh.tensor": 8}, "mesh.tensor", "num_heads=4"),
  ({"model.family": "encoder_decoder"}, "data.objective", "'span_corruption'"),
  ({"data.objective": "span_corruption"}, "data.objective", "'next_token'"),
  ({"data.objective": "next_tokens"}, "data.objective", "'next_token'"),
  (T5 | {"data.encoder_len": 0}, "data.encoder_len", "at least 1"),
  (T5 | {"data.encoder_len": 1}, "data.encoder_len", "at least 2"),
  (T5 | {"data.seq_len": 2}, "data.seq_len", "at least 3"),
  (T5 | {"data.noise_density": 1.0}, "data.noise_density", "below 1"),
  (T5 | {"data.mean_span": 0.5}, "data.mean_span", "at least 1"),
  (T5 | {"model.target_vocab_size": -1}, "model.target_vocab_size", "at least 0"),
  (
    T5 | {"data.encoder_len": 96, "model.moe.group_size": 1024, "train.batch_size": 8},
    "model.moe.group_size",
    "encoder_len",
  ),
  (T5 | {f"{R}.name": "expert_choice"}, f"{R}.name", "allow_noncausal_routing"),
  (T5 | {"model.attention": "latent"}, "model.family", "'decoder'"),
  (
    {"model.family": "lstm", "model.attention": "latent"},
    "model.attention",
    "family='lstm' has only",
  ),
  ({"model.family": "lstm", "model.sliding_window": 8}, "model.sliding_window", "another family"),
  ({"model.family": "lstm", "model.moe.extra_ffn": True}, "model.moe.extra_ffn", "False"),
  ({"model.family": "lstm", "data.objective": "span_corruption"}, "data.objective", "'next_token'"),
  ({"model.lstm_units": -1}, "model.lstm_units", "at least 0"),
  (
    {"model.family": "lstm", "model.lstm_units": 100, "mesh.data": 1, "mesh.tensor": 8},
    "mesh.tensor",
    "model.lstm_units=100",
  ),
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
  ({"model.moe.group_rows": 3}, "model.moe.group_rows", "32 sequences of a microbatch"),
  ({"model.moe.group_rows": 0}, "model.moe.group_rows", "at least 1"),
  ({"train.steps": 0}, "train.steps", "at least 1"),
  ({"train.accumulate_steps": 5}, "train.accumulate_steps", "batch_size=32"),
  (
    {"train.accumulate_steps": 2, "model.moe.balancing.rule": "quantile"},
    "model.moe.balancing.rule",
    "microbatches; set rule to quantile_histogram, or set train.accumulate_steps=1",
  ),
  (
    {
      "train.accumulate_steps": 2,
      f"{R}.name": "expert_threshold",
      "model.moe.balancing.rule": "expert_quantile",
    },
    "model.moe.balancing.rule",
    "microbatches; set train.accumulate_steps=1",
  ),
  ({"train.batch_size": 12}, "train.batch_size", "data=8"),
  (
    {"train.batch_size": 12, "mesh.data": 2, "mesh.expert": 4},
    "train.batch_size",
    "expert=4; nearest batch sizes: 8 "
    "or 16; nearest meshes that fit: expert=4 tensor=2; data=2 expert=2 tensor=2",
  ),
  ({"optimizer.learning_rate": -1.0}, "optimizer.learning_rate", "above 0"),
  ({"optimizer.warmup_steps": 1001}, "optimizer.warmup_steps", "train.steps=1000"),
  ({f"{R}.name": "switch"}, f"{R}.name", "--config.model.moe=switch"),
  (
    BRAIN | {"model.block": ("attention", f"moe:hidden={10**9}")},
    "model.block",
    "at most 1,048,576",
  ),
  (BRAIN | {"model.block": ("attention", "moe:hidden=" + "9" * 5000)}, "model.block", "digits"),
  (BRAIN | {"model.block": ("attention", "moe") * 200}, "model.num_layers", "400 sublayers"),
  ({"mesh.data": 16}, "mesh", "data=8"),
  ({"mesh.tensor": 0}, "mesh.tensor", "at least 1"),
  (
    {"mesh.data": 1, "mesh.expert": 8, "model.moe.num_experts": 12},
    "mesh.expert",
    "num_experts=12",
  ),
  ({"mesh.data": 1, "mesh.tensor": 8}, "mesh.tensor", "num_heads=4"),
  ({"mesh.expert": 2, "model.moe.num_experts": 0}, "mesh.expert", "dense"),
  ({"model.family": "brainformer"}, "model.block", "'attention'"),
  ({"model.block": ("attention",)}, "model.block", "must be ()"),
  (BRAIN | {"model.block": ("attention", 3)}, "model.block", "3 in it must be a string"),
  (BRAIN | {"model.block": ("atention", "moe")}, "model.block", "did you mean 'attention'"),
  (BRAIN | {"model.block": ("attention", "moe:gates=top_2")}, "model.block", "did you mean 'gate'"),
  (BRAIN | {"model.block": ("attention", "moe:gate=top_1")}, "model.block", "did you mean 'top_2'"),
  (BRAIN | {"model.block": ("attention:hidden=8", "moe")}, "model.block", "known: width, heads"),
  (BRAIN | {"model.block": ("attention:heads", "moe")}, "model.block", "whole number above 0"),
  (BRAIN | {"model.block": ("attention:heads=2.0", "moe")}, "model.block", "whole number above 0"),
  (BRAIN | {"model.block": ("attention", "moe:capacity=-1")}, "model.block", "number above 0"),
  (BRAIN | {"model.block": ("attention", "moe:capacity=1,capacity=2")}, "model.block", "twice"),
  (
    BRAIN | {"model.block": ("attention", "ffn:activation=swish", "moe")},
    "model.block",
    "did you mean 'swiglu'",
  ),
  (
    BRAIN | {"model.block": ("attention", "moe:gate=expert_choice")},
    "model.block",
    "allow_noncausal_routing=True",
  ),
  (BRAIN | {f"{R}.name": "expert_choice"}, f"{R}.name", "allow_noncausal_routing=True"),
  (BRAIN | {"model.block": ("attention", "ffn")}, "model.moe.num_experts", "must be 0"),
  (BRAIN | {"model.moe.num_experts": 0}, "model.block", "set model.moe.num_experts"),
  (BRAIN | {"model.moe.extra_ffn": True}, "model.moe.extra_ffn", "must be False"),
  (
    BRAIN | {"model.block": ("attention", "moe:gate=top_2"), "model.moe.soft_slots": 2},
    "model.block",
    "Soft MoE",
  ),
  (BRAIN | {"model.attention": "latent"}, "model.family", "'decoder'"),
  (BRAIN | {"data.objective": "span_corruption"}, "data.objective", "'next_token'"),
  (
    BRAIN | {"model.block": ("attention:heads=3", "moe"), "mesh.data": 2, "mesh.tensor": 4},
    "mesh.tensor",
    "num_heads=3 of model.block's 'attention:heads=3'",
  ),
  (BRAIN | {"model.num_kv_heads": 3}, "model.num_kv_heads", "num_heads=4"),
  # Experts without an FFN.
  ({"model.moe.copy_experts": -1}, "model.moe.copy_experts", "at least 0"),
  (
    {
      f"{R}.name": "expert_choice",
      "model.moe.zero_experts": 2,
      "model.moe.allow_noncausal_routing": True,
    },
    "model.moe.zero_experts",
    "such as top_k",
  ),
  (
    {f"{R}.name": "no_token_left_behind", "model.moe.copy_experts": 2},
    "model.moe.copy_experts",
    "compete for slots",
  ),
  ({"model.moe.soft_slots": 2, "model.moe.copy_experts": 1}, "model.moe.copy_experts", "Soft MoE"),
  (
    {"model.moe.device_loss": 0.1, "model.moe.devices": 2, "model.moe.constant_experts": 1},
    "model.moe.constant_experts",
    "device_loss=0",
  ),
  (
    {"model.moe.gate_on": "input", "model.moe.constant_experts": 1},
    "model.moe.constant_experts",
    "gate_on='output'",
  ),
  (
    {f"{R}.top_k.k": 12, "model.moe.zero_experts": 1, "model.moe.copy_experts": 2},
    f"{R}.top_k.k",
    "11",
  ),
]


@pytest.mark.parametrize(
  "changes, field, words",
  WRONG,
  ids=[" ".join(f"{k}={v}" for k, v in wrong[0].items()) for wrong in WRONG],
)
def test_mistakes_are_refused_by_name(changes, field, words):
  # Catches a missing check of any kind in the table, and a remedy that does not say what is right.
  with pytest.raises(ConfigError) as error:
    assembly.validate(config(changes), 8)
  assert error.value.field == field and words in str(error.value)
  assert "\n" not in str(error.value) and shown(error.value.value) in str(error.value)


@pytest.mark.parametrize(
  "mesh, field",
  [
    ({"mesh.data": 5040, "train.batch_size": 7}, "train.batch_size"),
    ({"mesh.data": 2**20, "mesh.tensor": 2**20}, "mesh"),
  ],
)
def test_meshes_of_machines_that_are_not_here(mesh, field):
  # Catches a search through all products of divisors, which takes hours for such a number of
  # devices.
  with pytest.raises(ConfigError) as error:
    assembly.validate(config(mesh))
  assert error.value.field == field


def test_schedules_that_do_not_know_the_length_of_the_run_may_be_cut_short():
  # Catches a short run of a paper's config that is refused although its warm-up is also the
  # constant of the decay.
  for schedule in ("rsqrt", "flat_rsqrt"):
    assembly.validate(config({"optimizer.schedule": schedule, "optimizer.warmup_steps": 10_000}))
  assembly.validate(config({"optimizer.warmup_steps": 1000}))


def test_dense_models_need_no_experts_to_be_right():
  # Catches a dense model that is refused because of keys of experts.
  assembly.validate(
    config({"model.moe.num_experts": 0, "model.moe.first": 99, f"{R}.top_k.k": 99}), 8
  )


def test_an_encoder_decoder_is_valid():
  # Catches a refused model in which only the encoder has layers with experts, and a decoder that is
  # refused because of keys of an encoder.
  assembly.validate(config(T5), 8)
  assembly.validate(config(T5 | {"model.num_encoder_layers": 2, "model.num_layers": 1}), 8)
  assembly.validate(config({"data.encoder_len": 1}), 8)


def test_an_lstm_is_valid():
  # Catches an LSTM that is refused because of its number of heads, which it does not use.
  assembly.validate(
    config(
      {
        "model.family": "lstm",
        "model.num_kv_heads": 3,
        "model.head_dim": 31,
        "model.d_ff": 7,
        "model.position": "relative",
        "mesh.data": 1,
        "mesh.tensor": 8,
      }
    ),
    8,
  )


def test_a_brainformer_is_valid():
  # Catches a block without experts that is refused, and a gate that looks ahead and is refused
  # although that is allowed.
  assembly.validate(config(BRAIN), 8)
  assembly.validate(
    config(BRAIN | {"model.block": ("attention", "ffn"), "model.moe.num_experts": 0}), 8
  )
  assembly.validate(
    config(
      BRAIN
      | {
        "model.block": ("attention", "moe:gate=expert_choice"),
        "model.moe.allow_noncausal_routing": True,
      }
    ),
    8,
  )


def test_only_what_is_used_must_fit():
  # Catches a head of odd width that is refused without RoPE, and latent attention that is refused
  # because of key-value heads, which it does not have.
  assembly.validate(config({"model.position": "relative", "model.head_dim": 31}), 8)
  assembly.validate(
    config(
      {
        "model.attention": "latent",
        "model.num_kv_heads": 3,
        "model.head_dim": 31,
        "mesh.data": 2,
        "mesh.tensor": 4,
      }
    ),
    8,
  )


def test_noncausal_routing_on_demand():
  # Catches a refusal that cannot be overruled.
  assembly.validate(
    config({f"{R}.name": "expert_choice", "model.moe.allow_noncausal_routing": True})
  )
