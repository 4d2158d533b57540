"""ST-MoE (Zoph et al. 2022, arXiv 2202.08906), Table 11: T5 with top-2 experts in every fourth
layer and router z-loss.

  python -m moe_jax.train --config=configs/st_moe.py:32b --workdir=runs/st_moe
  python -m moe_jax.train --config=configs/st_moe.py:desk --workdir=runs/st_moe_desk

The released shape: 24 layers a stack and a dense FFN before each layer with experts; `_27` reads
Table 11 as 27 layers without. Ablations: optimizer.update_clip=0.1 (Table 4),
model.ffn_bias=multiplicative (appendix C), model.moe.jitter. Groups are of whole rows, so that the
decoder's are smaller: in L 456 and 2048 tokens, as in the paper. Open: all data but C4, which takes
their place. As released, no batch-prioritised routing in the encoder. The auxiliary losses'
weights, 0.01 and 0.001, are ambiguous by the number of layers with experts, 12 in all: the paper's
runs were made with Mesh-TensorFlow, which adds up the losses of all layers; T5X, for which the
released configurations are written, takes their mean, as here.
`--config.model.moe.layer_reduce=sum` is the other reading. The output softmax's z-loss is that of
the released configurations, see `shared.t5`. Deviation: weights begin with standard deviation
1/sqrt(fan_in) (moe_jax/layers/init.py), not with Switch's sqrt(0.1) of that.
"""

from configs import shared

COLUMNS = (
  "model.d_model",
  "model.d_ff",
  "model.num_heads",
  "model.head_dim",
  "model.num_layers",
  "model.moe.num_experts",
  "model.moe.extra_ffn",
  "model.moe.group_rows",
  "paper.parameters",
  "paper.activated",
  "paper.note",
)
NAME = "the paper's 32B are what 1.25 slots a token activate (capacity factor 1.25), not top-2"
# width, FFN, heads, of width, layers of each stack, experts, extra FFNs, rows a group, claim
VARIANTS = {
  "32b": (5120, 20_480, 64, 128, 24, 64, True, 8, 269e9, 32e9, NAME),
  "32b_27": (5120, 20_480, 64, 128, 27, 64, False, 8, 269e9, 32e9, NAME),
  "l": (1024, 2816, 16, 64, 24, 32, True, 4, 4.1e9, 0.0, ""),
  "l_27": (1024, 2816, 16, 64, 27, 32, False, 4, 4.1e9, 0.0, ""),
  "dense_l": (1024, 2816, 16, 64, 27, 0, False, 1, 0.8e9, 0.0, ""),
}


def get_config(variant="32b"):
  c = shared.paper_scale("st_moe", shared.variant(variant, VARIANTS, COLUMNS))
  c.paper.name = "ST-MoE"
  shared.t5(
    c, sequences=2048, steps=1_430_511 if variant.startswith("32b") else 500_000
  )  # 2^20 tokens; 1.5T of them
  c.model.vocab_size, c.model.tied_embeddings, c.model.activation = 32_128, False, "geglu"
  c.model.moe.first, c.model.moe.every = 3, 4
  return shared.desk(c) if variant == "desk" else c
