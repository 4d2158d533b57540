"""Two findings of the papers, and whether they hold for the recorded routing.

The verdict is "holds", "does not hold" or "is not decided", by the rules that the functions state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from moe_jax.analysis.jackknife import half_width
from moe_jax.analysis.sharpness import FEWEST_LAYERS, chance_of_rise, spearman
from moe_jax.analysis.specialisation import MEASURES

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "is not decided"
LEVEL = 0.05  # the largest probability of a trend by chance that counts as one


class Shares(NamedTuple):
  """The explained shares of all layers, with M measures in the order of `MEASURES`.

  Attributes:
    value: The shares.
    most: The largest values that they could have.
    chance: Their levels of chance.
    chance_width: Half widths of the intervals of chance.
    replicates: The shares without each of B blocks.
  """

  value: Float[np.ndarray, "Lm M"]
  most: Float[np.ndarray, "Lm M"]
  chance: Float[np.ndarray, "Lm M"]
  chance_width: Float[np.ndarray, "Lm M"]
  replicates: Float[np.ndarray, "B Lm M"]


def lexical(shares: Shares, num_domains: int) -> dict[str, Any]:
  """Judges whether specialisation is lexical rather than topical (Mixtral, arXiv 2401.04088).

  The excess of a measure is its mean over layers minus that of its level of chance. The rule:

  - With fewer than two domains, or if neither the token's identity given the domain nor the domain
    given the identity exceeds chance by more than the half width of the interval of chance, the
    finding is not decided.
  - It holds if the excess of what is lexical is above the excess of what is topical, by more than
    the half width of the 95 % interval of their difference, both as shares of the expert's entropy
    and as shares of what each could explain at most. The second comparison is asked, too, because
    a label with many values, such as the identity, can explain more than one with few.
  - It does not hold if the difference is below 0 in the same way in both comparisons.
  - Otherwise it is not decided.

  Returns:
    A dict with the entries "verdict", "of_expert" and "of_most". The last two are comparisons, with
    the entries "lexical" and "topical" (explained shares, mean over layers), "lexical_chance" and
    "topical_chance", "difference" (of the excesses), "half_width" (of its 95 % interval; None if
    a domain has fewer than two rows) and "exceeds_chance".
  """
  pair = [tuple(MEASURES).index(name) for name in ("lexical", "topical")]
  most = np.maximum(shares.most[:, pair], 1e-9)
  compared = {
    "of_expert": _compare(shares, pair, np.ones_like(most)),
    "of_most": _compare(shares, pair, most),
  }
  signs = {_sign(each["difference"], each["half_width"]) for each in compared.values()}
  verdict = UNDECIDED
  if num_domains > 1 and compared["of_expert"]["exceeds_chance"]:
    verdict = HOLDS if signs == {1} else FAILS if signs == {-1} else UNDECIDED
  return {"verdict": verdict, **compared}


def _compare(shares: Shares, pair: list[int], whole: Float[np.ndarray, "Lm 2"]) -> dict[str, Any]:
  """Compares two measures, each divided by `whole`, of which the first is the lexical one."""
  value, chance, width = (
    (each[:, pair] / whole).mean(axis=0)
    for each in (shares.value, shares.chance, shares.chance_width)
  )
  excess = value - chance
  without = (shares.replicates[:, :, pair] / whole).mean(axis=1)
  error = float(half_width(without[:, 0] - without[:, 1]))
  return {
    "lexical": float(value[0]),
    "lexical_chance": float(chance[0]),
    "topical": float(value[1]),
    "topical_chance": float(chance[1]),
    "difference": float(excess[0] - excess[1]),
    "half_width": error if math.isfinite(error) else None,
    "exceeds_chance": bool((excess > width).any()),
  }


def _sign(difference: float, width: float | None) -> int:
  """Returns 1 or -1 if the interval around the difference does not contain 0, and 0 otherwise."""
  if width is None or abs(difference) <= width:
    return 0
  return 1 if difference > 0 else -1


def sharper(entropy: Sequence[float], top: Sequence[float]) -> dict[str, Any]:
  """Judges whether deeper layers route more sharply, that is, with less entropy.

  The statistic is Spearman's rank correlation of a layer's place with the negative mean entropy of
  its probabilities. The rule:

  - With fewer than four layers, the finding is not decided, because every order is then likely.
  - It holds if at most 5 % of all orders of the layers have a correlation as high.
  - It does not hold if the correlation is not above 0.
  - Otherwise it is not decided.

  Args:
    entropy: The mean entropy of each layer with experts, in order.
    top: The mean of the largest probability of each layer. It is only reported.

  Returns:
    A dict with "verdict", "layers", "spearman", "chance" (the share of orders whose correlation is
    as high), "smallest_chance" (the smallest such share with as many layers) and "spearman_of_top".
  """
  count = len(entropy)
  place, sharpness = np.arange(count), -np.asarray(entropy, float)
  correlation, chance = spearman(place, sharpness), chance_of_rise(sharpness)
  verdict = UNDECIDED
  if count >= FEWEST_LAYERS:
    verdict = HOLDS if chance <= LEVEL else FAILS if correlation <= 0 else UNDECIDED
  return {
    "verdict": verdict,
    "layers": count,
    "spearman": correlation,
    "chance": chance,
    "smallest_chance": 1 / math.factorial(count),
    "spearman_of_top": spearman(place, np.asarray(top, float)),
  }


def sentences(result: Mapping[str, Any]) -> dict[str, str]:
  """Returns a sentence with the numbers of each finding of `results.analyse`.

  Args:
    result: The dict of `results.analyse`.
  """
  found = result["findings"]
  shares, most = found["lexical"]["of_expert"], found["lexical"]["of_most"]
  if len(result["domains"]) < 2:
    first = "there is one domain only, so that nothing can be told about topics."
  else:
    first = (
      f"within a domain, the token explains {_with_chance(shares, 'lexical')} of the choice of "
      f"expert; for a given token, the domain explains {_with_chance(shares, 'topical')}. The "
      f"difference beyond chance is {_difference(shares)}, and {_difference(most)} as shares of "
      "what each could explain at most."
    )
  sharp, entropy, top = found["sharper"], result["sharpness"]["entropy"], result["sharpness"]["top"]
  experts, layers = result["num_experts"], sharp["layers"]
  least = f" ({sharp['smallest_chance']:.0%} is the least that {layers} layers can have)"
  second = (
    f"from the first to the last layer with experts, the entropy of the router goes from "
    f"{entropy[0]:.3f} to {entropy[-1]:.3f} nats ({math.log(experts):.3f} is indifference) and the "
    f"largest probability from {top[0]:.3f} to {top[-1]:.3f} ({1 / experts:.3f} is indifference). "
    f"The rank correlation of depth and sharpness is {sharp['spearman']:+.2f}; of all orders of "
    f"{layers} layers, {sharp['chance']:.1%} have one as high"
  ) + (f"{least}." if layers < FEWEST_LAYERS else ".")
  return {"lexical": first, "sharper": second}


# The findings as claims, to which a verdict is added.
CLAIMS = {
  "lexical": "Specialisation is lexical rather than topical",
  "sharper": "Deeper layers route more sharply",
}


def _with_chance(comparison: Mapping[str, Any], name: str) -> str:
  """Returns an explained share and its level of chance in words."""
  return f"{comparison[name]:.1%} (chance {comparison[f'{name}_chance']:.1%})"


def _difference(comparison: Mapping[str, Any]) -> str:
  """Returns a difference of shares, in percentage points, with the half width of its interval."""
  width = comparison["half_width"]
  shown = f" ± {100 * width:.1f}" if width is not None else " (with no interval)"
  return f"{100 * comparison['difference']:+.1f}{shown} points"
