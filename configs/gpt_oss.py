"""Configures gpt-oss-20b and gpt-oss-120b (OpenAI 2025, arXiv 2508.10925) as released.

  python -m moe_jax.train --config=configs/gpt_oss.py:20b --workdir=runs/gpt_oss
  python -m moe_jax.train --config=configs/gpt_oss.py:desk --workdir=runs/gpt_oss_desk

Every layer has 32 or 128 experts, top-4, whose products all have biases and whose SwiGLU is
clamped. Every other layer sees only the last 128 tokens, and all heads have a sink.

Open: the data, the number of tokens, the batch size, the learning rate and how the experts were
balanced are not public, so we use OLMoE's recipe on C4, and there is no balance loss.

Deviation: there is no YaRN, with which the released models read longer rows than 4096 tokens;
weights are initialised with standard deviation 1/sqrt(fan_in), and sinks at 0.
"""

from configs import shared

_NOTE = "the paper's activated parameters leave the input embedding out"
VARIANTS = {
  "20b": {
    "model.num_layers": 24,
    "model.moe.num_experts": 32,
    "paper.parameters": 20.9e9,
    "paper.activated": 3.6e9,
    "paper.note": _NOTE,
  },
  "120b": {
    "model.num_layers": 36,
    "paper.parameters": 116.8e9,
    "paper.activated": 5.1e9,
    "paper.note": _NOTE,
  },
}
# What both models have.
_SIZES = {
  "model.d_model": 2880,
  "model.d_ff": 2880,
  "model.num_heads": 64,
  "model.num_kv_heads": 8,
  "model.head_dim": 64,
  "model.vocab_size": 201_088,
}


def get_config(variant="20b"):
  """Returns the config of a variant, a key of `VARIANTS` or "desk"."""
  c = shared.paper_scale("gpt_oss", _SIZES | shared.variant(variant, VARIANTS))
  c.paper.name = "gpt-oss"
  c.paper.arxiv = "2508.10925"
  c.model.moe.first, c.model.moe.every = 0, 1
  c.model.activation, c.model.moe.expert_bias = "clamped_swiglu", True
  shared.open_decoder(c, norm_eps=1e-5)
  c.model.rope_theta = 150_000.0
  c.model.qkv_bias = c.model.output_bias = c.model.sinks = True
  c.model.sliding_window, c.model.global_every = 128, 2
  shared.adamw(c, 4e-4, 2500)
  shared.batch(c, sequences=1024, seq_len=4096, tokens=5e12)
  return shared.desk(c) if variant == "desk" else c
