"""DeepSeek-V3 (arXiv 2412.19437), the main model: latent attention, sigmoid gates balanced by a
bias, 8 of 256 experts.

  python -m moe_jax.train --config=configs/deepseek_v3.py:671b --workdir=runs/v3
  python -m moe_jax.train --config=configs/deepseek_v3.py:desk --workdir=runs/v3_desk

Open: the data are not public, C4 stands in. Deviation: no multi-token prediction and no FP8; the
batch is 15,360 from the first step on; the rate falls from 2.2e-4 to 2.2e-5 over the last third in
a straight line, where the paper has half a cosine over 4.3T tokens and two flat ends; the bias'
step does not end at 14.3T tokens. `desk` caps 256 experts at 16, of which 4 of 8 groups are exactly
the 8 of a token.
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
  c = shared.paper_scale("deepseek_v3", shared.variant(variant, VARIANTS))
  c.paper.name = "DeepSeek-V3"
  c.model.moe.first, c.model.moe.every = 3, 1
  shared.open_decoder(c, norm_eps=1e-6)
  c.model.attention = "latent"
  shared.adamw(c, 2.2e-4, 2000, "wsd", decay_fraction=4.8 / 14.8)
  shared.batch(c, 15_360, 4096, 14.8e12)
  return shared.desk(c) if variant == "desk" else c
