"""Configures LLaMA-2-7B (arXiv 2307.09288) and LLaMA-3-8B (arXiv 2407.21783), which are dense.

  python -m moe_jax.train --config=configs/llama.py:2_7b --workdir=runs/llama
  python -m moe_jax.train --config=configs/llama.py:desk --workdir=runs/llama_desk

They are the parents of mixtures that begin with trained weights, such as LLaMA-MoE;
`python -m moe_jax convert` reads their released weights.

Open: the data are not public, so C4 replaces them. For LLaMA-3, the batch size is that of LLaMA-2,
where the paper's grows during training.

Deviation: weights are initialised with standard deviation 1/sqrt(fan_in).
"""

from configs import shared

VARIANTS = {
  "2_7b": {
    "model.d_model": 4096,
    "model.d_ff": 11_008,
    "model.num_layers": 32,
    "model.num_heads": 32,
    "model.head_dim": 128,
    "model.vocab_size": 32_000,
    "paper.parameters": 6.7e9,
  },
  "3_8b": {
    "model.d_model": 4096,
    "model.d_ff": 14_336,
    "model.num_layers": 32,
    "model.num_heads": 32,
    "model.num_kv_heads": 8,
    "model.head_dim": 128,
    "model.vocab_size": 128_256,
    "model.rope_theta": 5e5,
    "paper.parameters": 8e9,
  },
}


def get_config(variant="2_7b"):
  """Returns the config of a variant, a key of `VARIANTS` or "desk"."""
  sizes = shared.variant(variant, VARIANTS)
  c = shared.paper_scale("mixtral", sizes | {"model.moe.num_experts": 0})
  c.paper.name = "LLaMA"
  shared.open_decoder(c, norm_eps=1e-5)
  shared.adamw(c, 3e-4, 2000)
  shared.batch(c, sequences=1024, seq_len=4096, tokens=15e12 if variant == "3_8b" else 2e12)
  return shared.desk(c) if variant == "desk" else c
