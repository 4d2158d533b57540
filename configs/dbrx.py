"""Configures DBRX (Databricks 2024) as released: 16 SwiGLU experts in each layer, top-4, dropless.

  python -m moe_jax.train --config=configs/dbrx.py:132b --workdir=runs/dbrx
  python -m moe_jax.train --config=configs/dbrx.py:desk --workdir=runs/dbrx_desk  # minutes on a CPU

LayerNorm has scales but no biases, and its class's default epsilon, 1e-5.

Open: the batch size and the optimizer are not public, so we use OLMoE's recipe. C4 replaces the
data, whose mixture changed over the 12T tokens.
"""

from configs import shared

VARIANTS = {
  "132b": {
    "model.d_model": 6144,
    "model.d_ff": 10_752,
    "model.num_layers": 40,
    "model.num_heads": 48,
    "model.num_kv_heads": 8,
    "model.head_dim": 128,
    "model.vocab_size": 100_352,
    "paper.parameters": 132e9,
    "paper.activated": 36e9,
  }
}


def get_config(variant="132b"):
  """Returns the config of a variant, a key of `VARIANTS` or "desk"."""
  c = shared.paper_scale("dbrx", shared.variant(variant, VARIANTS))
  c.paper.name = "DBRX"
  c.model.moe.first, c.model.moe.every = 0, 1
  shared.open_decoder(c, norm_eps=1e-5)
  c.model.norm, c.model.rope_theta, c.model.clip_qkv = "layernorm", 5e5, 8.0
  shared.adamw(c, 4e-4, 2500)
  shared.batch(c, sequences=128, seq_len=32_768, tokens=12e12)
  return shared.desk(c) if variant == "desk" else c
