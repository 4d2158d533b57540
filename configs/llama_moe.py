"""Configures LLaMA-MoE (Zhu et al. 2024, arXiv 2406.16554): LLaMA-2-7B's FFNs split into experts.

  python -m moe_jax.train --config=configs/llama_moe.py:3_5b_4_16 --workdir=runs/llama_moe
  python -m moe_jax.train --config=configs/llama_moe.py:desk --workdir=runs/llama_moe_desk

The gate is a network with tanh, and gates are multiplied by N/K. The paper's CV^2 uses the unbiased
variance, which makes it E/(E - 1) times ours; the coefficients below include this factor.

Training begins from a LLaMA by `python -m moe_jax surgery partition` (docs/surgery.md); without it
the experts are drawn at random.

Open: C4 replaces SlimPajama and its sampling weights. That the learning rate decays as a cosine is
from memory.
"""

from configs import shared

VARIANTS = {
  "3_5b_4_16": shared.size(experts=16, experts_a_token=4, expert_width=688, activated=3.5e9),
  "3_0b_2_16": shared.size(experts=16, experts_a_token=2, expert_width=688, activated=3.0e9),
  "3_5b_2_8": shared.size(experts=8, experts_a_token=2, expert_width=1376, activated=3.5e9),
}
LLAMA_2_7B = {
  "model.d_model": 4096,
  "model.d_ff": 11_008,
  "model.num_layers": 32,
  "model.num_heads": 32,
  "model.head_dim": 128,
  "model.vocab_size": 32_000,
  "paper.parameters": 6.7e9,
}


def get_config(variant="3_5b_4_16"):
  """Returns the config of a variant, a key of `VARIANTS` or "desk"."""
  sizes = shared.variant(variant, VARIANTS)
  experts, k = sizes["model.moe.num_experts"], sizes["model.moe.router.noisy_top_k.k"]
  c = shared.paper_scale("llama_moe", LLAMA_2_7B | sizes)
  c.paper.name = "LLaMA-MoE"
  c.paper.arxiv = "2406.16554"
  c.model.moe.first, c.model.moe.every = 0, 1
  c.model.moe.routed_scale = experts / k
  c.model.moe.importance_loss = c.model.moe.load_loss = 0.01 * experts / (experts - 1)
  # This is LLaMA-2's epsilon; LLaMA's was 1e-6.
  shared.open_decoder(c, norm_eps=1e-5)
  shared.adamw(c, 2e-4, 100)
  shared.batch(c, sequences=3584, seq_len=4096, tokens=13_623 * 3584 * 4096)
  return shared.desk(c) if variant == "desk" else c
