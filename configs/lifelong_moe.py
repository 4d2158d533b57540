"""Configures Lifelong-MoE (Chen et al. 2023, arXiv 2305.12281): GLaM, whose experts become more.

  python -m moe_jax.train --config=configs/lifelong_moe.py:0_1b_16e --workdir=runs/lifelong_a
  python -m moe_jax.train --config=configs/lifelong_moe.py:desk --workdir=runs/lifelong_desk

A decoder is trained on one distribution of text after the other. Before each new one, layers get
more experts (`python -m moe_jax surgery expand`); the old experts and their columns of the router
stay as they are (`optimizer.freeze_experts`), the dense layers train on, and the model of before
is the teacher of the new one (`train.teacher` with hard_weight 1). docs/surgery.md has the
commands, and `python -m experiments lifelong` runs whole sequences beside other ways to learn one.

The variants are the steps of one model: GLaM's 0.1B with 16, 32, 64 and 128 experts. All have the
same dense layers and cost the same per token. `desk` has 8 experts, which leaves room for more.

Open: the paper's own sizes were not read, so that sizes and claims are GLaM's, as are vocabulary,
optimizer and batch (configs/glam.py). How many experts each distribution adds, whether they begin
as copies, and the weight and the direction of the divergence are not known here either; they are
flags of `surgery expand` and keys of `train.teacher`. C4 replaces Wikipedia and web pages, the
first distribution; the later ones, other languages and dialogue, are given by `data.sources`.

The slots of an expert are a share of the tokens divided by the number of experts. With GLaM's
capacity of 1.0, old experts therefore take fewer tokens when new ones come;
--config.model.moe.capacity_factor=None drops none.
"""

from configs import glam, shared

VARIANTS = {name: glam.VARIANTS[name] for name in ("0_1b_16e", "0_1b_32e", "0_1b_64e", "0_1b_128e")}


def get_config(variant="0_1b_16e"):
  """Returns the config of a variant, a key of `VARIANTS` or "desk"."""
  c = glam.architecture("glam", variant, VARIANTS)
  c.paper.name = "Lifelong-MoE"
  c.paper.arxiv = "2305.12281"
  if variant == "desk":
    c = shared.desk(c)
    c.model.moe.num_experts = 8
  return c
