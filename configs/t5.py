"""T5 (Raffel et al. 2020) as Switch's Table 9 has it: the dense models that configs/switch.py is
measured against.

  python -m moe_jax.train --config=configs/t5.py:base --workdir=runs/t5
  python -m moe_jax.train --config=configs/t5.py:desk --workdir=runs/t5_desk  # minutes on a CPU

Base and large have the ReLU FFNs whose counts fit the paper's; Table 9 prints GEGLU of 2816 for
large (`large_geglu`). Training is Switch's, so that curves compare: 2^20 tokens a batch, 550,000
steps.
"""

from configs import shared

COLUMNS = (
  "model.d_model",
  "model.d_ff",
  "model.num_heads",
  "model.num_layers",
  "model.activation",
  "model.tied_embeddings",
  "paper.parameters",
  "paper.note",
)
VARIANTS = {  # width, FFN, heads of 64, layers of each stack, FFN, one embedding, claim
  "base": (768, 3072, 12, 12, "relu", True, 223e6, ""),
  "large": (1024, 4096, 16, 24, "relu", True, 739e6, ""),
  "large_geglu": (
    1024,
    2816,
    16,
    24,
    "geglu",
    True,
    739e6,
    "Table 9's GEGLU FFN; ReLU of 4096 is 739M's",
  ),
  "xxl": (4096, 10_240, 64, 24, "geglu", False, 11e9, ""),
}


def get_config(variant="base"):
  return architecture(
    "T5", variant, shared.variant(variant, VARIANTS, COLUMNS) | {"model.moe.num_experts": 0}
  )


def architecture(name, variant, sizes):
  """An encoder-decoder of T5 with Switch's routing and training; `desk` where the variant is."""
  c = shared.paper_scale(
    "switch",
    {"model.head_dim": 64, "model.vocab_size": 32_128, "model.moe.first": 1, "model.moe.every": 2}
    | sizes,
  )
  c.paper.name = name
  shared.t5(c, sequences=2048, steps=550_000)
  return shared.desk(c) if variant == "desk" else c
