"""Configures DeepSeek-V2 and V2-Lite (arXiv 2405.04434): latent attention, 2 shared experts.

  python -m moe_jax.train --config=configs/deepseek_v2.py:236b --workdir=runs/v2        # or :lite
  python -m moe_jax.train --config=configs/deepseek_v2.py:desk --workdir=runs/v2_desk

In V2 the experts of a token lie on 3 of 8 devices. The paper's numbers of activated parameters do
not include the input embedding.

Open: the data are not public, so C4 replaces them.

Deviation: the batch size is 9216 from the first step on instead of starting at 2304; no token is
dropped (the paper drops tokens per device in training); weights are initialised with standard
deviation 1/sqrt(fan_in); there is no YaRN, which the released models use for longer rows.

`desk` caps the 160 experts at 16. A token then visits all 6 experts of its 3 groups out of 8.
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
  """Returns the config of a variant, a key of `VARIANTS` or "desk"."""
  # The routing of V2-Lite is DeepSeekMoE's: no device limit and no factor on the routed outputs.
  lite = variant == "lite"
  c = shared.paper_scale(
    "deepseek_moe" if lite else "deepseek_v2", shared.variant(variant, VARIANTS)
  )
  c.paper.name, c.paper.note = "DeepSeek-V2", NOTE
  c.paper.arxiv = "2405.04434"
  c.model.moe.first, c.model.moe.every = 1, 1
  shared.open_decoder(c, norm_eps=1e-6)
  c.model.attention, c.model.vocab_size = "latent", 102_400
  shared.adamw(c, 4.2e-4 if lite else 2.4e-4, 2000, "steps", milestones=(0.6, 0.9))
  shared.batch(c, 4608 if lite else 9216, 4096, 5.7e12 if lite else 8.1e12)
  return shared.desk(c) if variant == "desk" else c
