"""Configures Kimi K2 (Moonshot AI 2025, arXiv 2507.20534): a token visits 8 of 384 experts.

  python -m moe_jax.train --config=configs/kimi_k2.py:1t --workdir=runs/kimi
  python -m moe_jax.train --config=configs/kimi_k2.py:desk --workdir=runs/kimi_desk

It is DeepSeek-V3 with more experts, half as many heads, one dense layer and no groups of experts.

Open: the data are not public, so C4 replaces them. We use DeepSeek-V3's batch size, learning rate
and rule of balancing with Kimi K2's 15.5e12 tokens.

Deviation: the optimizer is AdamW, where the paper has MuonClip; there is no YaRN, which the
released model uses for longer rows.
"""

from configs import shared

VARIANTS = {
  "1t": {
    "model.d_model": 7168,
    "model.d_ff": 18_432,
    "model.moe.d_ff": 2048,
    "model.num_layers": 61,
    "model.num_heads": 64,
    "model.head_dim": 128,
    "model.latent.query_rank": 1536,
    "model.vocab_size": 163_840,
    "paper.parameters": 1.04e12,
    "paper.activated": 32.6e9,
    "paper.note": "the released configuration has 1.03T parameters",
  }
}


def get_config(variant="1t"):
  """Returns the config of a variant, a key of `VARIANTS` or "desk"."""
  c = shared.paper_scale("kimi_k2", shared.variant(variant, VARIANTS))
  c.paper.name = "Kimi K2"
  c.paper.arxiv = "2507.20534"
  c.model.moe.first, c.model.moe.every = 1, 1
  shared.open_decoder(c, norm_eps=1e-6)
  c.model.attention, c.model.rope_theta = "latent", 50_000.0
  shared.adamw(c, 2.2e-4, 2000, "wsd", decay_fraction=4.8 / 14.8)
  shared.batch(c, 15_360, 4096, 15.5e12)
  return shared.desk(c) if variant == "desk" else c
