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

XXL_64 = "64 experts (Table 9) make half the claim; the released 128 make it"
GEGLU = "Table 9's GEGLU FFN; the released ReLU of 4096 fits the claim"
VARIANTS = {
  "base_128e": shared.size(
    width=768,
    ffn=3072,
    heads=12,
    layers=12,
    activation="relu",
    tied_embeddings=True,
    experts=128,
    group_rows=16,
    parameters=7.41e9,
  ),
  "base_16e": shared.size(
    width=768,
    ffn=3072,
    heads=12,
    layers=12,
    activation="relu",
    tied_embeddings=True,
    experts=16,
    group_rows=16,
    parameters=1.1e9,
  ),
  "base_32e": shared.size(
    width=768,
    ffn=3072,
    heads=12,
    layers=12,
    activation="relu",
    tied_embeddings=True,
    experts=32,
    group_rows=16,
    parameters=2.0e9,
  ),
  "base_64e": shared.size(
    width=768,
    ffn=3072,
    heads=12,
    layers=12,
    activation="relu",
    tied_embeddings=True,
    experts=64,
    group_rows=16,
    parameters=3.8e9,
  ),
  "base_256e": shared.size(
    width=768,
    ffn=3072,
    heads=12,
    layers=12,
    activation="relu",
    tied_embeddings=True,
    experts=256,
    group_rows=16,
    parameters=14.7e9,
  ),
  "large_128e": shared.size(
    width=1024,
    ffn=4096,
    heads=16,
    layers=24,
    activation="relu",
    tied_embeddings=True,
    experts=128,
    group_rows=8,
    parameters=26e9,
  ),
  "large_128e_geglu": shared.size(
    width=1024,
    ffn=2816,
    heads=16,
    layers=24,
    activation="geglu",
    tied_embeddings=True,
    experts=128,
    group_rows=8,
    parameters=26e9,
    note=GEGLU,
  ),
  "xxl_128e": shared.size(
    width=4096,
    ffn=10_240,
    heads=64,
    layers=24,
    activation="geglu",
    tied_embeddings=False,
    experts=128,
    group_rows=8,
    parameters=395e9,
  ),
  "xxl_64e": shared.size(
    width=4096,
    ffn=10_240,
    heads=64,
    layers=24,
    activation="geglu",
    tied_embeddings=False,
    experts=64,
    group_rows=8,
    parameters=395e9,
    note=XXL_64,
  ),
  "c": shared.size(
    width=2080,
    ffn=6144,
    heads=32,
    layers=15,
    activation="relu",
    tied_embeddings=False,
    experts=2048,
    group_rows=4,
    parameters=1.571e12,
  ),
  "c_30_heads": shared.size(
    width=2080,
    ffn=6144,
    heads=30,
    layers=15,
    activation="relu",
    tied_embeddings=False,
    experts=2048,
    group_rows=4,
    parameters=1.571e12,
  ),
}


def get_config(variant="base_128e"):
  """Returns the config of a variant, a key of `VARIANTS` or "desk"."""
  every_layer = {"model.moe.first": 0, "model.moe.every": 1} if variant.startswith("c") else {}
  c = t5.architecture("Switch", variant, shared.variant(variant, VARIANTS) | every_layer)
  if every_layer:
    c.model.moe.capacity_factor, c.model.moe.min_capacity = 1.0, 2
  if variant.startswith("xxl"):
    c.model.moe.eval_capacity_factor, c.model.moe.min_capacity = 4.0, 2
  return c
