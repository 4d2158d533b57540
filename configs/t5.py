"""Configures T5 (Raffel et al. 2020) as in Switch's Table 9, the baselines of configs/switch.py.

  python -m moe_jax.train --config=configs/t5.py:base --workdir=runs/t5
  python -m moe_jax.train --config=configs/t5.py:desk --workdir=runs/t5_desk  # minutes on a CPU

These models are dense. Base and large have ReLU FFNs, whose parameter counts fit the paper's. For
large, Table 9 prints GEGLU FFNs of width 2816 (`large_geglu`). Training is Switch's, so that loss
curves can be compared: 2^20 tokens per batch and 550,000 steps.
"""

from configs import shared

VARIANTS = {
  "base": shared.size(
    width=768,
    ffn=3072,
    heads=12,
    layers=12,
    activation="relu",
    tied_embeddings=True,
    parameters=223e6,
  ),
  "large": shared.size(
    width=1024,
    ffn=4096,
    heads=16,
    layers=24,
    activation="relu",
    tied_embeddings=True,
    parameters=739e6,
  ),
  "large_geglu": shared.size(
    width=1024,
    ffn=2816,
    heads=16,
    layers=24,
    activation="geglu",
    tied_embeddings=True,
    parameters=739e6,
    note="Table 9's GEGLU FFN; ReLU of 4096 is 739M's",
  ),
  "xxl": shared.size(
    width=4096,
    ffn=10_240,
    heads=64,
    layers=24,
    activation="geglu",
    tied_embeddings=False,
    parameters=11e9,
  ),
}


def get_config(variant="base"):
  """Returns the config of a variant, a key of `VARIANTS` or "desk"."""
  return architecture(
    "T5", variant, shared.variant(variant, VARIANTS) | {"model.moe.num_experts": 0}
  )


def architecture(name, variant, sizes, arxiv="1910.10683"):
  """Returns the config of a T5 encoder-decoder with Switch's routing and training.

  Args:
    name: The paper's name for the model.
    variant: The variant's name. "desk" shrinks the model.
    sizes: The sizes of the variant, from dotted keys to values.
    arxiv: The number of the paper at arXiv.
  """
  c = shared.paper_scale(
    "switch",
    {"model.head_dim": 64, "model.vocab_size": 32_128, "model.moe.first": 1, "model.moe.every": 2}
    | sizes,
  )
  c.paper.name, c.paper.arxiv = name, arxiv
  shared.t5(c, sequences=2048, steps=550_000)
  return shared.desk(c) if variant == "desk" else c
