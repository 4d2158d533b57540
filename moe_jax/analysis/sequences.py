"""Experts along the text, through the depth of the model, and from checkpoint to checkpoint."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from moe_jax.analysis.information import SHUFFLES, explained, explained_by_chance, table


class Repetition(NamedTuple):
  """How often successive tokens have the same expert.

  Attributes:
    first: The share of successors whose first choice is that of the token before.
    first_shuffled: The same share after tokens were shuffled. Uneven load raises it above 1/E.
    either: The share of successors that have one of their first two choices in common with the
      token before; NaN if tokens have one expert.
    either_shuffled: The same share after tokens were shuffled.
    pairs: The number of pairs of successive tokens.
  """

  first: float
  first_shuffled: float
  either: float
  either_shuffled: float
  pairs: int


def uniform_repetition(num_experts: int) -> tuple[float, float]:
  """Returns what `Repetition.first` and `either` would be if experts were drawn uniformly.

  These are 1/E and 1 - (E-2)(E-3) / (E(E-1)), 12.5 % and 46 % for 8 experts (Mixtral, Sec. 5).
  """
  e = num_experts
  return 1 / e, 1 - (e - 2) * (e - 3) / (e * (e - 1)) if e > 1 else 1.0


def repetition(
  first: Int[np.ndarray, "N"],
  second: Int[np.ndarray, "N"],
  follows: Bool[np.ndarray, "N"],
  num_experts: int,
) -> Repetition:
  """Returns the repetition of experts in a layer (Mixtral, arXiv 2401.04088, Table 5).

  Args:
    first: The first choice of each token.
    second: The second choice; `num_experts` stands for none.
    follows: Whether each token is the successor of the one before it.
    num_experts: The number of experts E. Pairs in which a token has no expert are left out.
  """
  has_two = bool((second < num_experts).any())
  draw = np.random.default_rng(0)
  places = np.arange(len(first))
  measured = _repeated(first, second, follows, num_experts, places)
  shuffled = np.mean(
    [
      _repeated(first, second, follows, num_experts, draw.permutation(places))
      for _ in range(SHUFFLES)
    ],
    axis=0,
  )
  pairs = int((follows[1:] & (first[1:] < num_experts) & (first[:-1] < num_experts)).sum())
  either = (float(measured[1]), float(shuffled[1])) if has_two else (float("nan"), float("nan"))
  return Repetition(float(measured[0]), float(shuffled[0]), *either, pairs)


def _repeated(first, second, follows, num_experts: int, order) -> tuple[float, float]:
  """Returns the shares `first` and `either` of tokens that are put into another order."""
  f, s = first[order], second[order]
  pairs = follows[1:] & (f[1:] < num_experts) & (f[:-1] < num_experts)
  same = f[1:] == f[:-1]
  common = same | (f[1:] == s[:-1]) | (s[1:] == f[:-1])
  common |= (s[1:] == s[:-1]) & (s[1:] < num_experts)
  count = max(1, pairs.sum())
  return (same & pairs).sum() / count, (common & pairs).sum() / count


class Coactivation(NamedTuple):
  """Which expert of the next layer follows each expert of a layer.

  Attributes:
    counts: The number of tokens with each pair of first choices.
    explained: The share of the entropy of the next layer's expert that the expert explains.
    chance: The mean of that share if the experts of the next layer are shuffled among tokens.
  """

  counts: Int[np.ndarray, "E E"]
  explained: float
  chance: float


def coactivation(
  here: Int[np.ndarray, "N"], there: Int[np.ndarray, "N"], num_experts: int
) -> Coactivation:
  """Returns how the first choices of a layer and of the next one go together."""
  shape = (num_experts, num_experts)
  counts = table(here, there, shape)
  return Coactivation(counts, explained(counts.T), explained_by_chance(there, here, shape))


class Churn(NamedTuple):
  """How many tokens change their first choice between two checkpoints.

  Attributes:
    changed: The share of tokens, in [0, 1].
    chance: The share if the choices of the two checkpoints were independent.
  """

  changed: float
  chance: float


def churn(before: Int[np.ndarray, "N"], after: Int[np.ndarray, "N"], num_experts: int) -> Churn:
  """Returns the churn of a layer. To have no expert (`num_experts`) is a choice like any other."""
  loads: list[Float[np.ndarray, "E+1"]] = [
    np.bincount(x, minlength=num_experts + 1) / max(1, len(x)) for x in (before, after)
  ]
  return Churn(float(np.mean(before != after)), float(1 - loads[0] @ loads[1]))
