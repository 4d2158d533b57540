"""Expert Choice (Zhou et al. 2022, arXiv 2202.09368), Table 1: GLaM's architecture, experts that
choose their tokens.

  python -m moe_jax.train --config=configs/expert_choice.py:8b_64e --workdir=runs/expert_choice
  python -m moe_jax.train --config=configs/expert_choice.py:desk --workdir=runs/expert_choice_desk

Capacity factor 2 (EC-CF2), no auxiliary loss; --config.model.moe=expert_choice_cap_2 and _cap_3 are
the capped ones. Experts see later tokens, so perplexities of this causal model are not those of a
generator, as the paper says itself. Open and inferred: as of configs/glam.py; the paper's
vocabulary is 256k, the totals fit 32k.
"""

from configs import glam, shared

VARIANTS = {
  name: glam.VARIANTS[name] for name in ("8b_64e", "0_1b_16e", "0_1b_32e", "0_1b_64e", "0_1b_128e")
}


def get_config(variant="8b_64e"):
  c = glam.architecture("expert_choice", variant, VARIANTS)
  c.paper.name = "Expert Choice"
  c.model.moe.allow_noncausal_routing = True
  # Experts take that many tokens and no more: nothing is dropped, and rows travel in buffers of
  # equal size.
  c.model.moe.capacity_factor, c.model.moe.dispatcher.name = 2.0, "all_to_all"
  return shared.desk(c) if variant == "desk" else c
