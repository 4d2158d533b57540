"""Configures the text models of Llama 4 Scout and Maverick (Meta 2025) as released.

  python -m moe_jax.train --config=configs/llama4.py:scout --workdir=runs/llama4      # or :maverick
  python -m moe_jax.train --config=configs/llama4.py:desk --workdir=runs/llama4_desk

A token visits one routed expert, whose input the gate multiplies, and one shared expert. Scout has
16 experts in every layer, and Maverick 128 in every other one. Every fourth layer has no positions.

Open: the data, the number of tokens, the batch size and the learning rate are not public, so we use
OLMoE's recipe on C4.

Deviation: there is no vision encoder, whose parameters the claims of the totals include. Rows of
8192 tokens are one chunk of the attention of layers with positions, so that there are no chunks.
Left out are Scout's norm of rotated queries and keys, which has no parameters, and the temperature
of attention at positions beyond 8192. Weights are initialised with standard deviation
1/sqrt(fan_in).
"""

from configs import shared

_TEXT = "the claim of the total includes the vision encoder"
VARIANTS = {
  "scout": {
    "model.moe.first": 0,
    "model.moe.every": 1,
    "paper.parameters": 109e9,
    "paper.activated": 17e9,
    "paper.note": _TEXT,
  },
  "maverick": {
    "model.moe.num_experts": 128,
    "model.moe.first": 1,
    "model.moe.every": 2,
    "paper.parameters": 400e9,
    "paper.activated": 17e9,
    "paper.note": _TEXT,
  },
}
# What both models have. Only Maverick has dense FFNs.
_SIZES = {
  "model.d_model": 5120,
  "model.d_ff": 16_384,
  "model.moe.d_ff": 8192,
  "model.num_layers": 48,
  "model.num_heads": 40,
  "model.num_kv_heads": 8,
  "model.head_dim": 128,
  "model.vocab_size": 202_048,
}


def get_config(variant="scout"):
  """Returns the config of a variant, a key of `VARIANTS` or "desk"."""
  c = shared.paper_scale("llama4", _SIZES | shared.variant(variant, VARIANTS))
  c.paper.name = "Llama 4"
  shared.open_decoder(c, norm_eps=1e-5)
  c.model.rope_theta = 500_000.0
  c.model.global_every, c.model.global_positions = 4, False
  shared.adamw(c, 4e-4, 2500)
  shared.batch(c, sequences=512, seq_len=8192, tokens=5e12)
  return shared.desk(c) if variant == "desk" else c
