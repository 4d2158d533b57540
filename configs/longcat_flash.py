"""Configures LongCat-Flash (Meituan 2025, arXiv 2509.01322) as released, without its shortcut.

  python -m moe_jax.train --config=configs/longcat_flash.py:560b --workdir=runs/longcat
  python -m moe_jax.train --config=configs/longcat_flash.py:desk --workdir=runs/longcat_desk

A token chooses 12 of 512 experts and 256 identity experts, which cost nothing. One of its 28 layers
has two latent attentions, two dense FFNs and one layer of experts; here these are two layers, of
which the second has an extra dense FFN right before its experts.

Open: the data are not public, so C4 replaces them. The batch size and the learning rate are those
of DeepSeek-V3; the number of tokens is that of the paper's abstract, more than 20e12.

Deviation: the paper's experts read what the first attention has written and are added after the
second dense FFN, so that their communication hides behind it; here everything is in sequence, and
the experts have a norm of their own. The factors on the two latents are left out, and so is
multi-token prediction.
"""

from configs import shared

VARIANTS = {
  "560b": {
    "model.d_model": 6144,
    "model.d_ff": 12_288,
    "model.moe.d_ff": 2048,
    "model.num_layers": 56,
    "model.num_heads": 64,
    "model.head_dim": 128,
    "model.latent.query_rank": 1536,
    "model.vocab_size": 131_072,
    "paper.parameters": 560e9,
    "paper.activated": 31.3e9,
    "paper.note": "the activated parameters are those of a token without identity experts, the "
    "most; the paper has 27B on average, and leaves the input embedding out",
  }
}


def get_config(variant="560b"):
  """Returns the config of a variant, a key of `VARIANTS` or "desk"."""
  c = shared.paper_scale("longcat_flash", shared.variant(variant, VARIANTS))
  c.paper.name = "LongCat-Flash"
  c.paper.arxiv = "2509.01322"
  c.model.moe.first, c.model.moe.every, c.model.moe.extra_ffn = 1, 2, True
  shared.open_decoder(c, norm_eps=1e-5)
  c.model.attention, c.model.rope_theta = "latent", 1e7
  shared.adamw(c, 2.2e-4, 2000, "wsd", decay_fraction=4.8 / 14.8)
  shared.batch(c, 15_360, 4096, 20e12)
  return shared.desk(c) if variant == "desk" else c
