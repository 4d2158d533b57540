"""Configures OLMoE-1B-7B (Muennighoff et al. 2024, arXiv 2409.02060) as released.

  python -m moe_jax.train --config=configs/olmoe.py:1b_7b --workdir=runs/olmoe
  python -m moe_jax.train --config=configs/olmoe.py:desk --workdir=runs/olmoe_desk

Every layer has 64 experts, top-8.

Open: the 5e12 tokens are the horizon of the learning rate schedule. C4 replaces OLMoE-mix. It is
not known whether OLMoE's runs had the output z-loss of OLMo 2 (1e-5); there is none here.

Deviation: weights are initialised with standard deviation 1/sqrt(fan_in) instead of 0.02.
"""

from configs import shared

VARIANTS = {
  "1b_7b": {
    "model.d_model": 2048,
    "model.d_ff": 8192,
    "model.moe.d_ff": 1024,
    "model.num_layers": 16,
    "model.num_heads": 16,
    "model.head_dim": 128,
    "model.vocab_size": 50_304,
    "paper.parameters": 6.9e9,
    "paper.activated": 1.3e9,
  }
}


def get_config(variant="1b_7b"):
  """Returns the config of a variant, a key of `VARIANTS` or "desk"."""
  c = shared.paper_scale("olmoe", shared.variant(variant, VARIANTS))
  c.paper.name = "OLMoE"
  c.paper.arxiv = "2409.02060"
  c.model.moe.first, c.model.moe.every = 0, 1
  # This is also the epsilon of the norms on queries and keys.
  shared.open_decoder(c, norm_eps=1e-5)
  c.model.qk_norm = True
  shared.adamw(c, 4e-4, 2500)
  shared.batch(c, sequences=1024, seq_len=4096, tokens=5e12)
  return shared.desk(c) if variant == "desk" else c
