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

HALF = (
  "the paper's own FLOPs (Table 6) also give 13.6B activated: 8.6B fewer than 145B's, not 10.0B"
)
# What several rows of the paper's table share.
_145B = shared.size(
  layers=62,
  width=4096,
  heads=32,
  ffn=10_944,
  vocabulary=102_400,
  expert_width=1408,
  experts=128,
  first=1,
  learning_rate=3e-4,
  steps=13_000,
)
VARIANTS = {
  "16b": shared.size(
    layers=28,
    width=2048,
    heads=16,
    ffn=10_944,
    vocabulary=102_400,
    expert_width=1408,
    experts=64,
    num_shared_experts=2,
    first=1,
    learning_rate=4.2e-4,
    steps=106_449,
    parameters=16.4e9,
    activated=2.8e9,
  ),
  "2b": shared.size(
    layers=9,
    width=1280,
    heads=10,
    ffn=3413,
    vocabulary=8192,
    expert_width=853,
    experts=63,
    num_shared_experts=1,
    first=0,
    learning_rate=1.08e-3,
    steps=25_000,
    parameters=2e9,
    activated=0.3e9,
  ),
  "145b": _145B | shared.size(num_shared_experts=4, parameters=144.6e9, activated=22.2e9),
  "142b_half": _145B
  | shared.size(num_shared_experts=2, parameters=142.3e9, activated=12.2e9, note=HALF),
  "gshard_137b": _145B
  | shared.size(
    ffn=10_923,
    expert_width=10_923,
    experts=16,
    num_shared_experts=0,
    parameters=136.5e9,
    activated=21.6e9,
  ),
}
PRESETS = {"145b": "deepseek_moe_145b", "142b_half": "deepseek_moe_145b", "gshard_137b": "gshard"}
# Routed experts per token of the variants that do not use the preset's value.
EXPERTS_A_TOKEN = {"2b": 7, "142b_half": 6}
# Variants whose learning rate is constant after the warm-up.
CONSTANT = ("145b", "142b_half", "gshard_137b")


def get_config(variant="16b"):
  """Returns the config of a variant, a key of `VARIANTS` or "desk"."""
  sizes = shared.variant(variant, VARIANTS)
  preset = PRESETS.get(variant, "deepseek_moe")
  c = shared.paper_scale(preset, sizes | {"model.head_dim": 128, "model.moe.every": 1})
  c.paper.name = "DeepSeekMoE"
  c.paper.arxiv = "2401.06066"
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
