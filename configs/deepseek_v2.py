"""DeepSeek-V2 (arXiv 2405.04434) and V2-Lite: latent attention, 2 shared experts, a token's experts
on 3 of 8 devices.

  python -m moe_jax.train --config=configs/deepseek_v2.py:236b --workdir=runs/v2        # or :lite
  python -m moe_jax.train --config=configs/deepseek_v2.py:desk --workdir=runs/v2_desk

The claims of activated parameters leave the input embedding out. Open: the data are not public, C4
stands in. Deviation: the batch is 9216 from the first step on and does not begin at 2304; nothing
is dropped (the paper drops by the device in training); weights begin with standard deviation
1/sqrt(fan_in); no YaRN, which the released models have for longer rows. `desk` caps 160 experts at
16, of which 3 of 8 groups are exactly the 6 of a token.
"""

from configs import shared

NOTE = "the paper's activated parameters leave the input embedding out"
VARIANTS = {
  "236b": {
    "model.d_model": 5120,
    "model.d_ff": 12_288,
    "model.moe.d_ff": 1536,
    "model.num_layers": 60,
    "model.num_heads": 128,
    "model.head_dim": 128,
    "model.latent.query_rank": 1536,
    "paper.parameters": 236e9,
    "paper.activated": 21e9,
  },
  "lite": {
    "model.d_model": 2048,
    "model.d_ff": 10_944,
    "model.moe.d_ff": 1408,
    "model.num_layers": 27,
    "model.num_heads": 16,
    "model.head_dim": 128,
    "paper.parameters": 15.7e9,
    "paper.activated": 2.4e9,
  },
}


def get_config(variant="236b"):
  lite = variant == "lite"  # its routing is DeepSeekMoE's: no devices, no factor
  c = shared.paper_scale(
    "deepseek_moe" if lite else "deepseek_v2", shared.variant(variant, VARIANTS)
  )
  c.paper.name, c.paper.note = "DeepSeek-V2", NOTE
  c.model.moe.first, c.model.moe.every = 1, 1
  shared.open_decoder(c, norm_eps=1e-6)
  c.model.attention, c.model.vocab_size = "latent", 102_400
  shared.adamw(c, 4.2e-4 if lite else 2.4e-4, 2000, "steps", milestones=(0.6, 0.9))
  shared.batch(c, 4608 if lite else 9216, 4096, 5.7e12 if lite else 8.1e12)
  return shared.desk(c) if variant == "desk" else c
