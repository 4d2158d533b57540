"""Configures GLM-4.5 and GLM-4.5-Air (Zhipu AI 2025, arXiv 2508.06471) as released.

  python -m moe_jax.train --config=configs/glm_4_5.py:355b --workdir=runs/glm          # or :air
  python -m moe_jax.train --config=configs/glm_4_5.py:desk --workdir=runs/glm_desk

A token visits 8 of 160 or 128 experts, which a bias balances, and one shared expert. Half of the
features of each head are rotated. GLM-4.5 normalises queries and keys head by head.

Open: the data are not public, so C4 replaces them. The batch size, the learning rate and the rate
of the bias are those of DeepSeek-V3; the 23e12 tokens are the paper's.

Deviation: the optimizer is AdamW, where the paper has Muon; there is no multi-token prediction. The
rotary embedding has the base 1e6 of the released models from the first step on, which they got for
longer rows.
"""

from configs import shared

_NOTE = "the paper's activated parameters leave the input embedding out"
VARIANTS = {
  "355b": {
    "model.d_model": 5120,
    "model.d_ff": 12_288,
    "model.moe.d_ff": 1536,
    "model.num_layers": 92,
    "model.moe.first": 3,
    "model.qk_norm": True,
    "paper.parameters": 355e9,
    "paper.activated": 32e9,
    "paper.note": _NOTE,
  },
  "air": {
    "model.d_model": 4096,
    "model.d_ff": 10_944,
    "model.moe.d_ff": 1408,
    "model.num_layers": 46,
    "model.moe.num_experts": 128,
    "model.moe.routed_scale": 1.0,
    "model.moe.first": 1,
    "paper.parameters": 106e9,
    "paper.activated": 12e9,
    "paper.note": _NOTE,
  },
}
# What both models have.
_SIZES = {
  "model.num_heads": 96,
  "model.num_kv_heads": 8,
  "model.head_dim": 128,
  "model.vocab_size": 151_552,
}


def get_config(variant="355b"):
  """Returns the config of a variant, a key of `VARIANTS` or "desk"."""
  c = shared.paper_scale("glm_4_5", _SIZES | shared.variant(variant, VARIANTS))
  c.paper.name = "GLM-4.5"
  c.paper.arxiv = "2508.06471"
  c.model.moe.every = 1
  shared.open_decoder(c, norm_eps=1e-5)
  c.model.qkv_bias, c.model.qk_norm_over = True, "head"
  c.model.rope_theta, c.model.rotary_dim = 1e6, 64
  shared.adamw(c, 2.2e-4, 2000)
  shared.batch(c, 15_360, 4096, 23e12)
  return shared.desk(c) if variant == "desk" else c
