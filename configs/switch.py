"""Switch Transformers (Fedus et al. 2021, arXiv 2101.03961), Tables 6 to 9: T5 with top-1 experts.

  python -m moe_jax.train --config=configs/switch.py:base_128e --workdir=runs/switch
  python -m moe_jax.train --config=configs/switch.py:desk --workdir=runs/switch_desk

Experts in every other layer, and in all layers of Switch-C. Selective precision: bfloat16 with a
float32 router. Where Table 9 and the released configurations differ: XXL has 128 experts
(`xxl_64e`: Table 9's 64 make half the claim), large has ReLU FFNs of 4096 (`large_128e_geglu`:
Table 9's), `c` has Table 9's 32 heads (`c_30_heads`: the released 30; the count barely moves).
Groups are as many tokens of the encoder as in the released configurations (8192 in base), and of
the decoder those of as many rows. Open: XXL and C are given 576B tokens like all others; the
paper's XXL saw 503B. Inferred: the output softmax's z-loss, see `shared.t5`. Deviation: of the
weights only the router's begin smaller (see moe_jax/layers/init.py), where the paper takes
sqrt(0.1) of the usual standard deviation for all.
"""

from configs import shared, t5

COLUMNS = (
  "model.d_model",
  "model.d_ff",
  "model.num_heads",
  "model.num_layers",
  "model.activation",
  "model.tied_embeddings",
  "model.moe.num_experts",
  "model.moe.group_rows",
  "paper.parameters",
  "paper.note",
)
XXL_64 = "64 experts (Table 9) make half the claim; the released 128 make it"
GEGLU = "Table 9's GEGLU FFN; the released ReLU of 4096 fits the claim"
# width, FFN, heads of 64, layers of each stack, FFN, one embedding, experts, rows of 512 a group,
# claim
VARIANTS = {
  "base_128e": (768, 3072, 12, 12, "relu", True, 128, 16, 7.41e9, ""),
  "base_16e": (768, 3072, 12, 12, "relu", True, 16, 16, 1.1e9, ""),
  "base_32e": (768, 3072, 12, 12, "relu", True, 32, 16, 2.0e9, ""),
  "base_64e": (768, 3072, 12, 12, "relu", True, 64, 16, 3.8e9, ""),
  "base_256e": (768, 3072, 12, 12, "relu", True, 256, 16, 14.7e9, ""),
  "large_128e": (1024, 4096, 16, 24, "relu", True, 128, 8, 26e9, ""),
  "large_128e_geglu": (1024, 2816, 16, 24, "geglu", True, 128, 8, 26e9, GEGLU),
  "xxl_128e": (4096, 10_240, 64, 24, "geglu", False, 128, 8, 395e9, ""),
  "xxl_64e": (4096, 10_240, 64, 24, "geglu", False, 64, 8, 395e9, XXL_64),
  "c": (2080, 6144, 32, 15, "relu", False, 2048, 4, 1.571e12, ""),
  "c_30_heads": (2080, 6144, 30, 15, "relu", False, 2048, 4, 1.571e12, ""),
}


def get_config(variant="base_128e"):
  every_layer = {"model.moe.first": 0, "model.moe.every": 1} if variant.startswith("c") else {}
  c = t5.architecture("Switch", variant, shared.variant(variant, VARIANTS, COLUMNS) | every_layer)
  if every_layer:
    c.model.moe.capacity_factor, c.model.moe.min_capacity = 1.0, 2
  if variant.startswith("xxl"):
    c.model.moe.eval_capacity_factor, c.model.moe.min_capacity = 4.0, 2
  return c
