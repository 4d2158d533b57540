"""Configures GLaM (Du et al. 2021, arXiv 2112.06905), Table 4, with experts in every other layer.

  python -m moe_jax.train --config=configs/glam.py:64b_64e --workdir=runs/glam
  python -m moe_jax.train --config=configs/glam.py:desk --workdir=runs/glam_desk  # minutes on a CPU

Experts have two matrices, and the dense FFNs of the other layers are gated.

The vocabulary is 256k in the paper's text. However, the totals of all models but 64B/64E are those
of a vocabulary of 32k with one embedding, not counting norms and position biases. Each variant has
the vocabulary that fits its claim.

The following is taken from Lingvo, the authors' code, whose dense model of these dimensions
(DenseLm128B8x8) has 137,702,416,384 parameters, exactly as many as `137b` here: a table of 32
relative biases per layer, a norm with scales and no biases, a single embedding, and a loss of 1e-4
times log^2 Z of the output softmax. Two things are written differently here. Both are the same
functions and train in the same way, up to Adafactor's floor on a weight's RMS. Lingvo divides tied
logits by sqrt(d_model), while we multiply the rows of the embedding by it; and Lingvo puts
1/sqrt(head_dim) into the initial weights of the queries instead of using it as a factor.

Inferred: GELU inside the experts (the Expert Choice paper, on the same models, states it) and the
epsilon of the norms.

Open: the data (filtered web pages, Wikipedia, conversations, forums, books, news) are not public,
so C4 replaces them; all models read 600B tokens.

Both of the paper's tricks for stability (Sec. 5.1) are turned on: updates whose gradient is not
finite are skipped, and the run goes back to an earlier checkpoint. The paper does not say how far a
loss must rise for that, or for how many steps.
"""

from configs import shared

SMALL = (
  "the 145M are unexplained: 152M with top-2 and one embedding of 32k, 127M without the embedding"
)
THREE = "32 experts of two matrices make 14.0B; of three they would make 20.4B"
# What several rows of the paper's table share.
_0_1B = shared.size(
  layers=12, width=768, ffn=3072, heads=12, head_dim=64, vocabulary=32_000, activated=145e6
)
_1_7B = shared.size(layers=24, width=2048, ffn=8192, heads=16, head_dim=128, vocabulary=32_000)
_8B = shared.size(layers=32, width=4096, ffn=16_384, heads=32, head_dim=128, vocabulary=32_000)
_64B = shared.size(layers=64, width=8192, heads=128, head_dim=128)
VARIANTS = {
  "64b_64e": _64B
  | shared.size(ffn=32_768, experts=64, vocabulary=256_000, parameters=1.2e12, activated=96.6e9),
  "0_1b": _0_1B | shared.size(experts=0, parameters=130e6, activated=130e6),
  "0_1b_16e": _0_1B | shared.size(experts=16, parameters=548e6, note=SMALL),
  "0_1b_32e": _0_1B | shared.size(experts=32, parameters=1.0e9, note=SMALL),
  "0_1b_64e": _0_1B | shared.size(experts=64, parameters=1.9e9, note=SMALL),
  "0_1b_128e": _0_1B | shared.size(experts=128, parameters=3.7e9, note=SMALL),
  "1_7b": _1_7B | shared.size(experts=0, parameters=1.7e9, activated=1.7e9),
  "1_7b_32e": _1_7B | shared.size(experts=32, parameters=20e9, activated=1.878e9, note=THREE),
  "1_7b_64e": _1_7B | shared.size(experts=64, parameters=27e9, activated=1.879e9),
  "1_7b_128e": _1_7B | shared.size(experts=128, parameters=53e9, activated=1.881e9),
  "1_7b_256e": _1_7B | shared.size(experts=256, parameters=105e9, activated=1.886e9),
  "8b": _8B | shared.size(experts=0, parameters=8.7e9, activated=8.7e9),
  "8b_64e": _8B | shared.size(experts=64, parameters=143e9, activated=9.8e9),
  "137b": _64B
  | shared.size(ffn=65_536, experts=0, vocabulary=32_000, parameters=137e9, activated=137e9),
}


def get_config(variant="64b_64e"):
  """Returns the config of a variant, a key of `VARIANTS` or "desk"."""
  c = architecture("glam", variant)
  c.paper.name = "GLaM"
  c.paper.arxiv = "2112.06905"
  c = shared.desk(c) if variant == "desk" else c
  c.train.keep_last = 3
  c.train.guard.update(
    {
      "skip_nonfinite": True,
      "spike_sigmas": 8.0,
      "patience": 4,
      "max_rollbacks": 3,
      "rollback_margin": 20,
      "starved_share": 0.02,
    }
  )
  return c


def architecture(preset, variant, variants=VARIANTS):
  """Returns GLaM's config with the routing of `preset`, so that Expert Choice can reuse it."""
  c = shared.paper_scale(preset, shared.variant(variant, variants))
  c.model.moe.first, c.model.moe.every = 1, 2
  c.model.activation, c.model.moe.activation = "geglu", "gelu"
  c.model.position, c.train.output_z_loss = "relative", 1e-4
  shared.adafactor(c)
  c.data.tokenizer = "sentencepiece:tokenizer.model"
  shared.batch(c, sequences=1024, seq_len=1024, tokens=600e9)
  return c
