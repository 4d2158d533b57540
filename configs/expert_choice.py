"""Configures Expert Choice (Zhou et al. 2022, arXiv 2202.09368), Table 1, on GLaM's architecture.

  python -m moe_jax.train --config=configs/expert_choice.py:8b_64e --workdir=runs/expert_choice
  python -m moe_jax.train --config=configs/expert_choice.py:desk --workdir=runs/expert_choice_desk

Experts choose their tokens, with capacity factor 2 (EC-CF2) and no auxiliary loss.
--config.model.moe=expert_choice_cap_2 and _cap_3 select the capped variants. Experts see later
tokens, so the perplexities of this causal model are not those of a model that generates text, as
the paper says itself.

Open and inferred: as in configs/glam.py. The paper's vocabulary is 256k, but its totals fit 32k.
"""

from configs import glam, shared

VARIANTS = {
  name: glam.VARIANTS[name] for name in ("8b_64e", "0_1b_16e", "0_1b_32e", "0_1b_64e", "0_1b_128e")
}


def get_config(variant="8b_64e"):
  """Returns the config of a variant, a key of `VARIANTS` or "desk"."""
  c = glam.architecture("expert_choice", variant, VARIANTS)
  c.paper.name = "Expert Choice"
  c.paper.arxiv = "2202.09368"
  c.model.moe.allow_noncausal_routing = True
  # Each expert takes exactly its capacity of tokens. Nothing is dropped, and rows travel in buffers
  # of equal size, which is what `all_to_all` exchanges.
  c.model.moe.capacity_factor, c.model.moe.dispatcher.name = 2.0, "all_to_all"
  return shared.desk(c) if variant == "desk" else c
