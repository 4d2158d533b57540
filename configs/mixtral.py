"""Configures Mixtral (Jiang et al. 2024, arXiv 2401.04088): 8 SwiGLU experts in each layer, top-2.

  python -m moe_jax.train --config=configs/mixtral.py:8x7b --workdir=runs/mixtral
  python -m moe_jax.train --config=configs/mixtral.py:desk --workdir=runs/mixtral_desk

8x22B has its released shape, with the vocabulary of 32,768 that maxtext uses; `8x22b_hf` has
32,000. The released 8x7B has no sliding window (`model.sliding_window`).

Open: the data, the number of tokens, the batch size and the learning rate are not public, so we use
OLMoE's recipe on C4.
"""

from configs import shared

_8X22B = {
  "model.d_model": 6144,
  "model.d_ff": 16_384,
  "model.num_layers": 56,
  "model.num_heads": 48,
  "model.num_kv_heads": 8,
  "model.head_dim": 128,
  "paper.parameters": 141e9,
  "paper.activated": 39e9,
}
VARIANTS = {
  "8x7b": {
    "model.d_model": 4096,
    "model.d_ff": 14_336,
    "model.num_layers": 32,
    "model.num_heads": 32,
    "model.num_kv_heads": 8,
    "model.head_dim": 128,
    "model.vocab_size": 32_000,
    "paper.parameters": 46.7e9,
    "paper.activated": 12.9e9,
  },
  "8x22b": _8X22B | {"model.vocab_size": 32_768},
  "8x22b_hf": _8X22B | {"model.vocab_size": 32_000},
}


def get_config(variant="8x7b"):
  """Returns the config of a variant, a key of `VARIANTS` or "desk"."""
  c = shared.paper_scale("mixtral", shared.variant(variant, VARIANTS))
  c.paper.name = "Mixtral"
  c.paper.arxiv = "2401.04088"
  c.model.moe.first, c.model.moe.every = 0, 1
  shared.open_decoder(c, norm_eps=1e-5)
  c.model.rope_theta = 1e6
  shared.adamw(c, 4e-4, 2500)
  shared.batch(c, sequences=128, seq_len=32_768, tokens=5e12)
  return shared.desk(c) if variant == "desk" else c
