"""Brainformers (Zhou et al. 2023, arXiv 2306.00008): blocks of 8 sublayers, stacked 3, 6 or 8
times.

  python -m moe_jax.train --config=configs/brainformer.py:1b_64e --workdir=runs/brainformer
  python -m moe_jax.train --config=configs/brainformer.py:desk --workdir=runs/brainformer_desk

The layout is an input: the blocks that the paper found are figures, which were not read, and what
others write of them disagrees: nothing here stands for them. What stands in model.block is the
block that the search was measured against, GLaM's, as 8 sublayers: the models are those of Table
3's rows "GLaM" and count as configs/glam.py. Another is a flag:

  --config.model.d_model=1024
    --config.model.block="('attention:heads=16','moe:gate=top_2,hidden=2048','ffn',...)"

`width`, `hidden` and `heads` of a sublayer are the numbers that are used: for 1B/64E and 8B/64E the
paper doubles and quadruples those of a block that it found at 100M/32E. Table 3 says of the found
blocks, which are not checked here: Brainformer-1 has 3.19B, 30B and 158B parameters, 156M, 1.38B
and 7.4B of them activated, and does 2.03, 2.00 and 1.96 steps a second; Brainformer-2 has 3.33B and
52B, 266M and 1.31B, and does 2.16 and 1.76. Open: data, vocabulary and all that is inferred as of
configs/glam.py. With gate=expert_choice later tokens decide what earlier ones get (see
configs/expert_choice.py); model.moe.allow_noncausal_routing=True says that this is meant.
"""

from configs import glam, shared

BLOCK = ("attention", "ffn", "attention", "moe") * 2
VARIANTS = {
  "100m_32e": glam.VARIANTS["0_1b_32e"],
  "1b_64e": glam.VARIANTS["1_7b_64e"],
  "8b_64e": glam.VARIANTS["8b_64e"],
}


def get_config(variant="100m_32e"):
  c = glam.architecture("glam", variant, VARIANTS)
  c.paper.name = "Brainformers, Table 3, GLaM"
  m = c.model
  m.family, m.block, m.num_layers = "brainformer", BLOCK, 2 * m.num_layers // len(BLOCK)
  # GLaM's 1.0 S*K/E, in the unit in which expert choice counts, so that a sublayer's capacity means
  # one thing.
  m.moe.capacity_factor, m.moe.capacity_basis = 2.0, "tokens"
  if variant == "desk":
    shared.desk(c)
    m.num_layers = 1
  return c
