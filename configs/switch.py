"""Configures Switch Transformers (Fedus et al. 2021, arXiv 2101.03961), Tables 6 to 9.

  python -m moe_jax.train --config=configs/switch.py:base_128e --workdir=runs/switch
  python -m moe_jax.train --config=configs/switch.py:desk --workdir=runs/switch_desk

The models are T5 with top-1 experts in every other layer, and in all layers of Switch-C. Precision
is selective: bfloat16 with a float32 router.

Table 9 and the released configurations differ in three places:
- XXL has 128 experts here, because Table 9's 64 experts (`xxl_64e`) give half of the claimed
  parameters.
- Large has ReLU FFNs of width 4096; `large_128e_geglu` has Table 9's FFNs.
- `c` has the 32 heads of Table 9; `c_30_heads` has the released 30. The parameter count hardly
  changes.

A group has as many encoder tokens as in the released configurations (8192 in base); in the decoder,
it has the tokens of as many rows.

Open: XXL and C are trained on 576B tokens like all others; the paper's XXL saw 503B.

Inferred: the z-loss of the output softmax, see `shared.t5`.

Deviation: only the weights of the router are initialised with a smaller scale (see
moe_jax/layers/init.py); the paper uses sqrt(0.1) times the usual standard deviation for all
weights.
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
# The columns are width, width of FFNs and experts, heads of width 64, layers of each stack, kind of
# FFN, whether embeddings are tied, experts, rows of 512 tokens per group, and the paper's claim
# (parameters, note).
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
  """Returns the config of a variant, a key of `VARIANTS` or "desk"."""
  every_layer = {"model.moe.first": 0, "model.moe.every": 1} if variant.startswith("c") else {}
  c = t5.architecture("Switch", variant, shared.variant(variant, VARIANTS, COLUMNS) | every_layer)
  if every_layer:
    c.model.moe.capacity_factor, c.model.moe.min_capacity = 1.0, 2
  if variant.startswith("xxl"):
    c.model.moe.eval_capacity_factor, c.model.moe.min_capacity = 4.0, 2
  return c
