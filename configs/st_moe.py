"""Configures ST-MoE (Zoph et al. 2022, arXiv 2202.08906), Table 11: T5 with top-2 experts.

  python -m moe_jax.train --config=configs/st_moe.py:32b --workdir=runs/st_moe
  python -m moe_jax.train --config=configs/st_moe.py:desk --workdir=runs/st_moe_desk

Every fourth layer has experts, and the router has a z-loss. The shape is that of the released
models: 24 layers per stack, and an extra dense FFN before each layer of experts. The variants `_27`
read Table 11 as 27 layers without the extra FFN. Options for the paper's ablations are
optimizer.update_clip=0.1 (Table 4), model.ffn_bias=multiplicative (appendix C) and
model.moe.jitter.

Groups consist of whole rows, so those of the decoder are smaller: in L, 456 tokens against 2048, as
in the paper. As in the released models, the encoder has no batch-prioritised routing. The output
softmax's z-loss is that of the released configurations, see `shared.t5`.

Open: C4 replaces all other datasets. The weights of the auxiliary losses, 0.01 and 0.001, are
ambiguous by a factor of 12, the number of layers with experts. The paper's runs were made with
Mesh-TensorFlow, which sums the losses of all layers; T5X, for which the released configurations are
written, takes their mean, as we do. `--config.model.moe.layer_reduce=sum` selects the sum.

Deviation: weights are initialised with standard deviation 1/sqrt(fan_in)
(moe_jax/layers/init.py) instead of Switch's sqrt(0.1) times that.
"""

from configs import shared

NAME = "the paper's 32B are what 1.25 slots a token activate (capacity factor 1.25), not top-2"
# What several rows of the paper's table share.
_32B = shared.size(
  width=5120,
  ffn=20_480,
  heads=64,
  head_dim=128,
  experts=64,
  group_rows=8,
  parameters=269e9,
  activated=32e9,
  note=NAME,
)
_L = shared.size(
  width=1024,
  ffn=2816,
  heads=16,
  head_dim=64,
  layers=27,
  experts=32,
  extra_ffn=False,
  group_rows=4,
  parameters=4.1e9,
  activated=0.0,
)
VARIANTS = {
  "32b": _32B | shared.size(layers=24, extra_ffn=True),
  "32b_27": _32B | shared.size(layers=27, extra_ffn=False),
  "l": _L | shared.size(layers=24, extra_ffn=True),
  "l_27": _L,
  "dense_l": _L | shared.size(experts=0, group_rows=1, parameters=0.8e9),
}


def get_config(variant="32b"):
  """Returns the config of a variant, a key of `VARIANTS` or "desk"."""
  c = shared.paper_scale("st_moe", shared.variant(variant, VARIANTS))
  c.paper.name = "ST-MoE"
  c.paper.arxiv = "2202.08906"
  # A batch has 2^20 tokens; the 32B models read 1.5T tokens.
  shared.t5(c, sequences=2048, steps=1_430_511 if variant.startswith("32b") else 500_000)
  c.model.vocab_size, c.model.tied_embeddings, c.model.activation = 32_128, False, "geglu"
  c.model.moe.first, c.model.moe.every = 3, 4
  return shared.desk(c) if variant == "desk" else c
