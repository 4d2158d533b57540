"""Configures DeepSeekMoE (Dai et al. 2024, arXiv 2401.06066), Table 7, and GShard 137B of Table 6.

  python -m moe_jax.train --config=configs/deepseek_moe.py:16b --workdir=runs/deepseek_moe
  python -m moe_jax.train --config=configs/deepseek_moe.py:desk --workdir=runs/deepseek_moe_desk

DeepSeekMoE has fine-grained experts, some of which are shared by all tokens. The norms' epsilon is
that of the released 16B.

Open: the data are not public, so C4 replaces them. The width of the dense first layer is known only
for 16B; the larger models use its 10,944 too. The experts of 2B are 853 wide; a quarter of its FFN
of 8 d^2 parameters would be 853.3.

Deviation: weights are initialised with standard deviation 1/sqrt(fan_in) instead of 0.006;
activations are bfloat16, about which the paper says nothing.
"""

from configs import shared

COLUMNS = (
  "model.num_layers",
  "model.d_model",
  "model.num_heads",
  "model.d_ff",
  "model.vocab_size",
  "model.moe.d_ff",
  "model.moe.num_experts",
  "model.moe.num_shared_experts",
  "model.moe.first",
  "optimizer.learning_rate",
  "train.steps",
  "paper.parameters",
  "paper.activated",
  "paper.note",
)
HALF = (
  "the paper's own FLOPs (Table 6) also give 13.6B activated: 8.6B fewer than 145B's, not 10.0B"
)
# The columns are layers, width, heads, width of the dense FFN, vocabulary, width of an expert,
# routed experts, shared experts, first layer with experts, learning rate, steps, and the paper's
# claims (parameters, activated parameters, note).
VARIANTS = {
  "16b": (28, 2048, 16, 10_944, 102_400, 1408, 64, 2, 1, 4.2e-4, 106_449, 16.4e9, 2.8e9, ""),
  "2b": (9, 1280, 10, 3413, 8192, 853, 63, 1, 0, 1.08e-3, 25_000, 2e9, 0.3e9, ""),
  "145b": (62, 4096, 32, 10_944, 102_400, 1408, 128, 4, 1, 3e-4, 13_000, 144.6e9, 22.2e9, ""),
  "142b_half": (
    62,
    4096,
    32,
    10_944,
    102_400,
    1408,
    128,
    2,
    1,
    3e-4,
    13_000,
    142.3e9,
    12.2e9,
    HALF,
  ),
  "gshard_137b": (
    62,
    4096,
    32,
    10_923,
    102_400,
    10_923,
    16,
    0,
    1,
    3e-4,
    13_000,
    136.5e9,
    21.6e9,
    "",
  ),
}
PRESETS = {"145b": "deepseek_moe_145b", "142b_half": "deepseek_moe_145b", "gshard_137b": "gshard"}
# Routed experts per token of the variants that do not use the preset's value.
EXPERTS_A_TOKEN = {"2b": 7, "142b_half": 6}
# Variants whose learning rate is constant after the warm-up.
CONSTANT = ("145b", "142b_half", "gshard_137b")


def get_config(variant="16b"):
  """Returns the config of a variant, a key of `VARIANTS` or "desk"."""
  sizes = shared.variant(variant, VARIANTS, COLUMNS)
  preset = PRESETS.get(variant, "deepseek_moe")
  c = shared.paper_scale(preset, sizes | {"model.head_dim": 128, "model.moe.every": 1})
  c.paper.name = "DeepSeekMoE"
  if variant in EXPERTS_A_TOKEN:
    c.model.moe.router.top_k.k = EXPERTS_A_TOKEN[variant]
  if variant == "2b":
    c.model.moe.balance_loss = 0.01
  shared.open_decoder(c, norm_eps=1e-6)
  shared.adamw(
    c, sizes["optimizer.learning_rate"], 2000, "constant" if variant in CONSTANT else "steps"
  )
  rows, seq_len = (2048, 2048) if variant == "2b" else (4608, 4096)
  shared.batch(c, rows, seq_len, rows * seq_len * sizes["train.steps"])
  return shared.desk(c) if variant == "desk" else c
