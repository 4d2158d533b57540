"""Ageing evolution of a Brainformer's block.

The evolution is that of Real et al. 2019 (arXiv 1802.01548), the blocks are those of Brainformers
(arXiv 2306.00008). All functions are pure: the proposal of trial t follows from the seed, t, and
the rewards of the trials before its round.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence

from moe_jax.assembly.sublayers import kind, options, write
from moe_jax.models import SEARCH_SPACE
from moe_jax.models.brainformer import BLOCK_SUBLAYERS

Block = tuple[str, ...]
Space = Mapping[str, Mapping[str, tuple]]  # has the form of SEARCH_SPACE
# The numbers by which the paper's space is divided for a desk. Heads of width 64 become heads of
# width 16, so that a head keeps its share of the width.
DIVISORS = {"width": 16, "hidden": 16, "heads": 4}
HEAD_DIM = 16
LOST = -1.0  # the paper's reward of a candidate that was stopped early or diverged


def desk_space(gates: Sequence[str]) -> Space:
  """Returns `SEARCH_SPACE` divided by `DIVISORS`, with these gates only."""

  def small(name, values):
    return tuple(value // DIVISORS[name] for value in values) if name in DIVISORS else values

  space = {
    each: {name: small(name, values) for name, values in options_of_kind.items()}
    for each, options_of_kind in SEARCH_SPACE.items()
  }
  space["moe"]["gate"] = tuple(gates)
  return space


def glam_block(space: Space) -> Block:
  """Returns the block of the baseline.

  Attention and FFN take turns. Every other layer has experts of two matrices, and the dense FFNs
  are gated. Width 768, hidden width 3072 and 12 heads are the middle of the paper's space, as in
  GLaM's 0.1B/32E.
  """
  width, hidden, heads = (
    space["ffn"]["width"][1],
    space["ffn"]["hidden"][2],
    space["attention"]["heads"][0],
  )
  attention = write("attention", {"width": width, "heads": heads})
  ffn = write("ffn", {"width": width, "hidden": hidden, "activation": "geglu"})
  moe = write(
    "moe", {"width": width, "hidden": hidden, "activation": "gelu", "gate": "top_2", "capacity": 2}
  )
  return (attention, ffn, attention, moe) * (BLOCK_SUBLAYERS // 4)


@dataclasses.dataclass(frozen=True)
class Evolution:
  """The rule by which candidates are proposed.

  Attributes:
    space: The options of each kind of sublayer.
    seed: Seeds all draws.
    population: The number of latest candidates that may be parents. Each new candidate takes the
      place of the oldest one.
    sample: The number of these that are drawn for a tournament, whose best one is the parent.
    round: The number of trials that are proposed at once from the rewards before them, so that as
      many processes can train them.
  """

  space: Space
  seed: int = 0
  population: int = 12
  sample: int = 4
  round: int = 2

  def propose(self, trial: int, done: Sequence[tuple[Block, float]]) -> tuple[Block, int | None]:
    """Returns the block of a trial and the trial that is its parent.

    The first `population` trials are drawn at random, and have None for a parent.

    Args:
      trial: The number of the trial, from 0.
      done: The block and the reward of trials 0, 1, ..., of at least all trials before the round of
        this one. Later trials are not read.
    """
    draw = random.Random(f"{self.seed} {trial}")
    if trial < self.population:
      return tuple(
        self._sublayer(draw, draw.choice(list(self.space))) for _ in range(BLOCK_SUBLAYERS)
      ), None
    earlier = done[: trial - trial % self.round]
    alive = range(max(len(earlier) - self.population, 0), len(earlier))
    parent = max(draw.sample(alive, min(self.sample, len(alive))), key=lambda i: earlier[i][1])
    return self._mutate(draw, earlier[parent][0]), parent

  def _sublayer(self, draw: random.Random, name: str) -> str:
    return write(name, {option: draw.choice(values) for option, values in self.space[name].items()})

  def _mutate(self, draw: random.Random, block: Block) -> Block:
    """Returns the block with one sublayer changed.

    The sublayer gets another kind, with new options, or one of its options gets another value.
    """
    place = draw.randrange(len(block))
    name, old = kind(block[place]), options(block[place])
    open_ = [option for option, values in self.space[name].items() if len(values) > 1]
    what = draw.choice(["kind", *open_])
    if what == "kind":
      new = self._sublayer(draw, draw.choice([each for each in self.space if each != name]))
    else:
      new = write(
        name, old | {what: draw.choice([v for v in self.space[name][what] if v != old[what]])}
      )
    return block[:place] + (new,) + block[place + 1 :]


def reward(
  bits: float, step: float, quarter: float | None, glam_bits: float, glam_quarter: float
) -> float:
  """Returns how many bits per byte a candidate is below GLaM's block after the same time.

  It is `LOST` if the candidate was stopped after a quarter of the time.

  Args:
    bits: The held-out bits per byte at the end, NaN if training diverged or was stopped.
    step: The time of a step, in steps of GLaM's block.
    quarter: The bits per byte after a quarter of the time, or None if they are not known.
    glam_bits: The bits per byte of GLaM's block at the end.
    glam_quarter: The bits per byte of GLaM's block after a quarter of the time.
  """
  if bits != bits or quarter is not None and loses(step, quarter, glam_quarter):
    return LOST
  return max(glam_bits - bits, LOST)


def loses(step: float, quarter: float, glam_quarter: float) -> bool:
  """Returns whether a candidate is stopped after a quarter of the time.

  It is stopped if its steps are slower than those of GLaM's block and it has learnt less.
  """
  return step > 1 and not quarter <= glam_quarter


def best(done: Sequence[tuple[Block, float]], steps: Sequence[float]) -> int | None:
  """Returns the trial of the largest reward, or None.

  Only trials whose steps are no slower than those of GLaM's block count, as in the paper.
  """
  fast = [i for i, step in enumerate(steps) if step <= 1 and done[i][1] > LOST]
  return max(fast, key=lambda i: done[i][1]) if fast else None
