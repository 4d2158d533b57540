"""Entropies and mutual information of labels, in nats, from counts (plug-in estimates).

A label array holds an integer >= 0 for each of N tokens. With few tokens, the mutual information of
independent labels is above 0 (Miller 1955). It is therefore always shown beside its value for
shuffled labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int, Shaped

SHUFFLES = 20  # for a level of chance
_ITERATIONS = 200  # of `relative_pairs`, whose numbers are then right to many digits
# Labels whose combinations could be more than these are counted by sorting.
_MOST_CELLS = 2**22


def entropy(counts: Shaped[np.ndarray, "..."]) -> float:
  """Returns the entropy, in nats, of the distribution proportional to `counts`; 0 if all are 0."""
  total = counts.sum()
  p = counts[counts > 0] / max(total, 1)
  return max(0.0, float(-(p * np.log(p)).sum()))


def table(
  rows: Int[np.ndarray, "N"], columns: Int[np.ndarray, "N"], shape: tuple[int, int]
) -> Int[np.ndarray, "R C"]:
  """Returns how many tokens have each pair of labels; labels beyond `shape` are not counted."""
  inside = (rows < shape[0]) & (columns < shape[1])
  cells = rows[inside] * shape[1] + columns[inside]
  return np.bincount(cells, minlength=shape[0] * shape[1]).reshape(shape)


def explained(counts: Int[np.ndarray, "R C"]) -> float:
  """Returns the share of the rows' entropy that the columns explain, I(row; column) / H(row).

  It is in [0, 1], and 0 if there is only one row.

  Args:
    counts: The number of tokens of each row and column.
  """
  of_rows = entropy(counts.sum(axis=1))
  information = of_rows + entropy(counts.sum(axis=0)) - entropy(counts)
  return max(0.0, information / of_rows) if of_rows > 0 else 0.0


def explained_by_chance(
  rows: Int[np.ndarray, "N"], columns: Int[np.ndarray, "N"], shape: tuple[int, int]
) -> float:
  """Returns the mean of `explained` if the columns are shuffled among the tokens.

  It is above 0, because a small sample always shows some relation. The shuffles have a fixed seed.
  """
  draw = np.random.default_rng(0)
  shuffled = (table(rows, draw.permutation(columns), shape) for _ in range(SHUFFLES))
  return float(np.mean([explained(counts) for counts in shuffled]))


def relative(counts: Int[np.ndarray, "R C"]) -> Float[np.ndarray, "R C"]:
  """Returns each count divided by what it would be if rows and columns were independent.

  It is NaN in rows and columns that are empty.
  """
  expected = counts.sum(axis=1, keepdims=True) * counts.sum(axis=0) / max(1, counts.sum())
  with np.errstate(divide="ignore", invalid="ignore"):
    return np.where(expected > 0, counts / expected, np.nan)


def relative_pairs(pairs: Int[np.ndarray, "E E"]) -> Float[np.ndarray, "E E"]:
  """Returns each count of a pair of different labels divided by what it would be by chance.

  By chance each label is in as many pairs as it is, but with partners at random other than itself:
  the expected count of the pair (i, j) is a_i a_j with numbers a for which the sums of rows are
  those of `pairs` (quasi-independence, Goodman 1968). It is NaN on the diagonal and where a label
  is in no pair.

  Args:
    pairs: The number of pairs of labels i and j, symmetric, with zeros on the diagonal.
  """
  sums = pairs.sum(axis=1).astype(float)
  a = sums / np.sqrt(max(1.0, sums.sum()))
  for _ in range(_ITERATIONS):
    others = np.maximum(a.sum() - a, np.finfo(float).tiny)
    # The geometric mean of the old and the new value keeps them from swinging.
    a = np.sqrt(a * sums / others)
  expected = np.outer(a, a)
  np.fill_diagonal(expected, 0.0)
  with np.errstate(divide="ignore", invalid="ignore"):
    return np.where(expected > 0, pairs / expected, np.nan)


class Entropies:
  """The joint entropies of named label arrays, each of which is computed once.

  Args:
    labels: For each name, the label of each of N tokens.
  """

  def __init__(self, labels: Mapping[str, Int[np.ndarray, "N"]]):
    self._labels = labels
    self._known: dict[frozenset[str], float] = {frozenset(): 0.0}

  def joint(self, *names: str) -> float:
    """Returns the joint entropy, in nats, of the label arrays with these names; 0 without names.

    Raises:
      KeyError: If there are no labels with one of the names.
    """
    key = frozenset(names)
    if key not in self._known:
      self._known[key] = _joint_entropy([self._labels[name] for name in sorted(key)])
    return self._known[key]

  def information(self, x: str, y: str, *given: str) -> float:
    """Returns the mutual information I(x; y | given) in nats, >= 0, of named label arrays."""
    shared = self.joint(x, *given) + self.joint(y, *given)
    return max(0.0, shared - self.joint(x, y, *given) - self.joint(*given))

  def most(self, x: str, y: str, *given: str) -> float:
    """Returns min(H(x | given), H(y | given)) in nats, the most that `information` could be."""
    return min(self.joint(x, *given), self.joint(y, *given)) - self.joint(*given)


def _joint_entropy(labels: Sequence[Int[np.ndarray, "N"]]) -> float:
  """Returns the joint entropy of label arrays."""
  joint, cells = np.zeros_like(labels[0]), 1
  for label in labels:
    size = int(label.max(initial=0)) + 1
    joint, cells = joint * size + label, cells * size
  few = cells <= _MOST_CELLS
  return entropy(np.bincount(joint) if few else np.unique(joint, return_counts=True)[1])


def shuffled_within(
  strata: Int[np.ndarray, "N"], draw: np.random.Generator
) -> Int[np.ndarray, "N"]:
  """Returns a random order of the tokens in which each place keeps its stratum.

  `x[shuffled_within(strata, draw)]` shuffles x among the tokens of each stratum.
  """
  places = np.argsort(strata, kind="stable")
  order = np.empty_like(places)
  order[places] = np.argsort(strata + draw.random(len(strata)), kind="stable")
  return order
