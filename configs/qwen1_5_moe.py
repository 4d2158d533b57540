"""Configures Qwen1.5-MoE-A2.7B (Qwen team 2024) in its released configuration.

  python -m moe_jax.train --config=configs/qwen1_5_moe.py:a2_7b --workdir=runs/qwen
  python -m moe_jax.train --config=configs/qwen1_5_moe.py:desk --workdir=runs/qwen_desk

Every layer has 60 routed experts, top-4, and 4 shared experts, which are computed as one.

Open: the data, the number of tokens, the batch size and the learning rate are not public, so we use
OLMoE's recipe on C4. The original model was initialised with segments of a trained Qwen-1.8B, half
of which were drawn anew; this one is initialised randomly.
"""

from configs import shared

VARIANTS = {
  "a2_7b": {
    "model.d_model": 2048,
    "model.d_ff": 5632,
    "model.moe.d_ff": 1408,
    "model.num_layers": 24,
    "model.num_heads": 16,
    "model.head_dim": 128,
    "model.vocab_size": 151_936,
    "paper.parameters": 14.3e9,
    "paper.activated": 2.7e9,
  }
}


def get_config(variant="a2_7b"):
  """Returns the config of a variant, a key of `VARIANTS` or "desk"."""
  c = shared.paper_scale("qwen1_5_moe", shared.variant(variant, VARIANTS))
  c.paper.name = "Qwen1.5-MoE"
  c.model.moe.first, c.model.moe.every = 0, 1
  shared.open_decoder(c, norm_eps=1e-6)
  c.model.rope_theta, c.model.qkv_bias = 1e6, True
  shared.adamw(c, 4e-4, 2500)
  shared.batch(c, sequences=512, seq_len=8192, tokens=5e12)
  return shared.desk(c) if variant == "desk" else c
