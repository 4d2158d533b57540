"""Ageing evolution of a Brainformer's block (Real et al. 2019, arXiv 1802.01548; Brainformers,
arXiv 2306.00008).

Pure: what trial t proposes follows from the seed, t and the rewards of the trials before its round.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence

from moe_jax.assembly.sublayers import kind, options, write
from moe_jax.models import SEARCH_SPACE
from moe_jax.models.brainformer import BLOCK_SUBLAYERS

Block = tuple[str, ...]
Space = Mapping[str, Mapping[str, tuple]]  # as SEARCH_SPACE
# The paper's space for a desk: what each number is divided by. Heads of 64 become heads of 16, so
# that a head's share of the width stays.
DIVISORS = {"width": 16, "hidden": 16, "heads": 4}
HEAD_DIM = 16
LOST = -1.0  # reward of a candidate that was stopped early or diverged (the paper's)


def desk_space(gates: Sequence[str]) -> Space:
  """`SEARCH_SPACE` divided by `DIVISORS`, with these gates only."""

  def small(name, values):
    return tuple(value // DIVISORS[name] for value in values) if name in DIVISORS else values

  space = {
    each: {name: small(name, values) for name, values in known.items()}
    for each, known in SEARCH_SPACE.items()
  }
  space["moe"]["gate"] = tuple(gates)
  return space


def glam_block(space: Space) -> Block:
  """The baseline's: attention and FFN in turn, experts of two matrices in every other layer, gated
  dense FFNs.

  Width 768, hidden width 3072 and 12 heads are the middle of the paper's space, as in GLaM's
  0.1B/32E.
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
  """How candidates are proposed.

  Attributes:
    space: what sublayers may be.
    seed: of all draws.
    population: candidates that may be parents: the last so many, since each new one takes the
      oldest one's place.
    sample: of these, drawn for a tournament, whose best is the parent.
    round: trials that are proposed at once, from the rewards before them, so that as many processes
      can train them.
  """

  space: Space
  seed: int = 0
  population: int = 12
  sample: int = 4
  round: int = 2

  def propose(self, trial: int, done: Sequence[tuple[Block, float]]) -> tuple[Block, int | None]:
    """The block of that trial, and its parent; None for the first `population` trials, which are
    drawn at random.

    Args:
      trial: from 0.
      done: block and reward of trials 0, 1, ..., at least of all before this trial's round; later
        ones are not read.
    """
    draw = random.Random(f"{self.seed} {trial}")
    if trial < self.population:
      return tuple(
        self._sublayer(draw, draw.choice(list(self.space))) for _ in range(BLOCK_SUBLAYERS)
      ), None
    known = done[: trial - trial % self.round]
    alive = range(max(len(known) - self.population, 0), len(known))
    parent = max(draw.sample(alive, min(self.sample, len(alive))), key=lambda i: known[i][1])
    return self._mutate(draw, known[parent][0]), parent

  def _sublayer(self, draw: random.Random, name: str) -> str:
    return write(name, {option: draw.choice(values) for option, values in self.space[name].items()})

  def _mutate(self, draw: random.Random, block: Block) -> Block:
    """The block with one sublayer of another kind, with options drawn anew, or with one option of
    another value."""
    place = draw.randrange(len(block))
    name, said = kind(block[place]), options(block[place])
    open_ = [option for option, values in self.space[name].items() if len(values) > 1]
    what = draw.choice(["kind", *open_])
    if what == "kind":
      new = self._sublayer(draw, draw.choice([each for each in self.space if each != name]))
    else:
      new = write(
        name, said | {what: draw.choice([v for v in self.space[name][what] if v != said[what]])}
      )
    return block[:place] + (new,) + block[place + 1 :]


def reward(
  bits: float, step: float, quarter: float | None, glam_bits: float, glam_quarter: float
) -> float:
  """Bits per byte below GLaM's block after the same time; `LOST` where a quarter of it showed the
  candidate to lose.

  Args:
    bits: held out, at the end; NaN where training diverged or was stopped.
    step: time of a step, in GLaM's steps.
    quarter: bits per byte after a quarter of the time; None: not known.
    glam_bits: GLaM's.
    glam_quarter: GLaM's after a quarter of the time.
  """
  if bits != bits or quarter is not None and loses(step, quarter, glam_quarter):
    return LOST
  return max(glam_bits - bits, LOST)


def loses(step: float, quarter: float, glam_quarter: float) -> bool:
  """Whether a candidate is stopped after a quarter: its steps are slower than GLaM's, and it has
  learnt less."""
  return step > 1 and not quarter <= glam_quarter


def best(done: Sequence[tuple[Block, float]], steps: Sequence[float]) -> int | None:
  """The trial of the largest reward among those whose steps are no slower than GLaM's, the paper's
  constraint."""
  fast = [i for i, step in enumerate(steps) if step <= 1 and done[i][1] > LOST]
  return max(fast, key=lambda i: done[i][1]) if fast else None
