"""Configures Qwen2-7B, 1.5B and 0.5B (arXiv 2407.10671), which are dense.

  python -m moe_jax.train --config=configs/qwen2.py:7b --workdir=runs/qwen2
  python -m moe_jax.train --config=configs/qwen2.py:desk --workdir=runs/qwen2_desk

They are LLaMA with biases on queries, keys and values, and parents of mixtures that begin with
trained weights; `python -m moe_jax convert` reads their released weights.

Open: the data, the batch size and the learning rate are not public, so we use OLMoE's recipe on C4.
"""

from configs import shared

VARIANTS = {
  "7b": {
    "model.d_model": 3584,
    "model.d_ff": 18_944,
    "model.num_layers": 28,
    "model.num_heads": 28,
    "model.num_kv_heads": 4,
    "model.head_dim": 128,
    "model.vocab_size": 152_064,
    "paper.parameters": 7.6e9,
  },
  "1_5b": {
    "model.d_model": 1536,
    "model.d_ff": 8960,
    "model.num_layers": 28,
    "model.num_heads": 12,
    "model.num_kv_heads": 2,
    "model.head_dim": 128,
    "model.vocab_size": 151_936,
    "paper.parameters": 1.5e9,
  },
  "0_5b": {
    "model.d_model": 896,
    "model.d_ff": 4864,
    "model.num_layers": 24,
    "model.num_heads": 14,
    "model.num_kv_heads": 2,
    "model.head_dim": 64,
    "model.vocab_size": 151_936,
    "paper.parameters": 0.49e9,
  },
}


def get_config(variant="7b"):
  """Returns the config of a variant, a key of `VARIANTS` or "desk"."""
  sizes = shared.variant(variant, VARIANTS)
  c = shared.paper_scale("mixtral", sizes | {"model.moe.num_experts": 0})
  c.paper.name = "Qwen2"
  shared.open_decoder(c, norm_eps=1e-6)
  # The two smallest models share their embeddings with the output projection.
  c.model.tied_embeddings = variant in ("0_5b", "1_5b")
  c.model.rope_theta, c.model.qkv_bias = 1e6, True
  shared.adamw(c, 4e-4, 2500)
  shared.batch(c, sequences=512, seq_len=8192, tokens=7e12)
  return shared.desk(c) if variant == "desk" else c
