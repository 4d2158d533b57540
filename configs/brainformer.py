"""Configures Brainformers (Zhou et al. 2023, arXiv 2306.00008): stacks of blocks of 8 sublayers.

  python -m moe_jax.train --config=configs/brainformer.py:1b_64e --workdir=runs/brainformer
  python -m moe_jax.train --config=configs/brainformer.py:desk --workdir=runs/brainformer_desk

A model stacks its block 3, 6 or 8 times. The layout of the block is an input. The paper shows the
blocks that it found only as figures, which we have not read, and other authors describe them in
contradictory ways, so none of them is included here. The default of model.block is the block that
the search was compared with, GLaM's, written as 8 sublayers: the models are the rows "GLaM" of
Table 3 and have the same parameters as in configs/glam.py. Another block is set by a flag:

  --config.model.d_model=1024
    --config.model.block="('attention:heads=16','moe:gate=top_2,hidden=2048','ffn',...)"

`width`, `hidden` and `heads` of a sublayer are the numbers that are used: for 1B/64E and 8B/64E the
paper doubles and quadruples those of a block that it found at 100M/32E.

Table 3 says the following about the blocks that the paper found; none of it is checked here.
Brainformer-1 has 3.19B, 30B and 158B parameters, of which 156M, 1.38B and 7.4B are activated, and
trains at 2.03, 2.00 and 1.96 steps per second. Brainformer-2 has 3.33B and 52B parameters, of which
266M and 1.31B are activated, and trains at 2.16 and 1.76 steps per second.

Open: the data, the vocabulary and everything that is inferred are as in configs/glam.py. With
gate=expert_choice, later tokens affect the outputs of earlier ones (see configs/expert_choice.py);
such a gate requires model.moe.allow_noncausal_routing=True.
"""

from configs import glam, shared

BLOCK = ("attention", "ffn", "attention", "moe") * 2
VARIANTS = {
  "100m_32e": glam.VARIANTS["0_1b_32e"],
  "1b_64e": glam.VARIANTS["1_7b_64e"],
  "8b_64e": glam.VARIANTS["8b_64e"],
}


def get_config(variant="100m_32e"):
  """Returns the config of a variant, a key of `VARIANTS` or "desk"."""
  c = glam.architecture("glam", variant, VARIANTS)
  c.paper.name = "Brainformers, Table 3, GLaM"
  c.paper.arxiv = "2306.00008"
  m = c.model
  m.family, m.block, m.num_layers = "brainformer", BLOCK, 2 * m.num_layers // len(BLOCK)
  # This is GLaM's capacity of 1.0 S*K/E, expressed in the unit of expert choice, so that the option
  # `capacity` of a sublayer means the same for all gates.
  m.moe.capacity_factor, m.moe.capacity_basis = 2.0, "tokens"
  if variant == "desk":
    shared.desk(c)
    m.num_layers = 1
  return c
