"""Configures Qwen3-30B-A3B and Qwen3-235B-A22B (Qwen team 2025, arXiv 2505.09388) as released.

  python -m moe_jax.train --config=configs/qwen3_moe.py:30b_a3b --workdir=runs/qwen3
  python -m moe_jax.train --config=configs/qwen3_moe.py:desk --workdir=runs/qwen3_desk

Every layer has 128 experts, top-8, and queries and keys are normalised head by head.

Open: the data, the batch size and the learning rate are not public, so we use OLMoE's recipe on C4
with the paper's 36e12 tokens.

Deviation: the rotary embedding has the base 1e6 of the released models from the first step on,
which they got for longer rows; weights are initialised with standard deviation 1/sqrt(fan_in).
"""

from configs import shared

VARIANTS = {
  "30b_a3b": {
    "model.d_model": 2048,
    "model.d_ff": 6144,
    "model.moe.d_ff": 768,
    "model.num_layers": 48,
    "model.num_heads": 32,
    "paper.parameters": 30.5e9,
    "paper.activated": 3.3e9,
  },
  "235b_a22b": {
    "model.d_model": 4096,
    "model.d_ff": 12_288,
    "model.moe.d_ff": 1536,
    "model.num_layers": 94,
    "model.num_heads": 64,
    "paper.parameters": 235e9,
    "paper.activated": 22e9,
  },
}
# What both models have.
_SIZES = {"model.num_kv_heads": 4, "model.head_dim": 128, "model.vocab_size": 151_936}


def get_config(variant="30b_a3b"):
  """Returns the config of a variant, a key of `VARIANTS` or "desk"."""
  c = shared.paper_scale("qwen3_moe", _SIZES | shared.variant(variant, VARIANTS))
  c.paper.name = "Qwen3"
  c.paper.arxiv = "2505.09388"
  c.model.moe.first, c.model.moe.every = 0, 1
  shared.open_decoder(c, norm_eps=1e-6)
  c.model.rope_theta = 1e6
  c.model.qk_norm, c.model.qk_norm_over = True, "head"
  shared.adamw(c, 4e-4, 2500)
  shared.batch(c, sequences=1024, seq_len=4096, tokens=36e12)
  return shared.desk(c) if variant == "desk" else c
