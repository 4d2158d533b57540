"""Configures the main model of DeepSeek-V3 (arXiv 2412.19437): a token visits 8 of 256 experts.

  python -m moe_jax.train --config=configs/deepseek_v3.py:671b --workdir=runs/v3
  python -m moe_jax.train --config=configs/deepseek_v3.py:desk --workdir=runs/v3_desk

It has latent attention and sigmoid gates that are balanced by a bias.

Open: the data are not public, so C4 replaces them.

Deviation: there is no multi-token prediction and no FP8; the batch size is 15,360 from the first
step on; the learning rate falls linearly from 2.2e-4 to 2.2e-5 over the last third of training,
where the paper has half a cosine over 4.3T tokens and two constant phases at the end; updates of
the balancing bias do not stop at 14.3T tokens.

`desk` caps the 256 experts at 16. A token then visits all 8 experts of its 4 groups out of 8.
"""

from configs import shared

VARIANTS = {
  "671b": {
    "model.d_model": 7168,
    "model.d_ff": 18_432,
    "model.moe.d_ff": 2048,
    "model.num_layers": 61,
    "model.num_heads": 128,
    "model.head_dim": 128,
    "model.latent.query_rank": 1536,
    "model.vocab_size": 129_280,
    "paper.parameters": 671e9,
    "paper.activated": 37e9,
    "paper.note": "the experts' balancing bias is state and not a parameter here: 256 a layer",
  }
}


def get_config(variant="671b"):
  """Returns the config of a variant, a key of `VARIANTS` or "desk"."""
  c = shared.paper_scale("deepseek_v3", shared.variant(variant, VARIANTS))
  c.paper.name = "DeepSeek-V3"
  c.paper.arxiv = "2412.19437"
  c.model.moe.first, c.model.moe.every = 3, 1
  shared.open_decoder(c, norm_eps=1e-6)
  c.model.attention = "latent"
  shared.adamw(c, 2.2e-4, 2000, "wsd", decay_fraction=4.8 / 14.8)
  shared.batch(c, 15_360, 4096, 14.8e12)
  return shared.desk(c) if variant == "desk" else c
