"""Whether deeper layers route more sharply."""

from __future__ import annotations

import itertools
import math

import numpy as np
from jaxtyping import Shaped

# With fewer layers, no order of them is rarer than 5 % by chance: 1/3! is 17 %, and 1/4! is 4 %.
FEWEST_LAYERS = 4
_MOST_EXACT = 8  # layers whose orders are all tried; 8! are 40,320


def spearman(x: Shaped[np.ndarray, "n"], y: Shaped[np.ndarray, "n"]) -> float:
  """Returns Spearman's rank correlation in [-1, 1]; 0 if all values of one of them are equal."""
  ranks = [_ranks(values) for values in (x, y)]
  centred = [rank - rank.mean() for rank in ranks]
  spread = math.sqrt(float((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
  return float(centred[0] @ centred[1] / spread) if spread > 0 else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
  """Returns the rank of each value; equal values share the mean of their ranks."""
  _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
  ends = np.cumsum(counts)
  return (ends - (counts - 1) / 2)[index]


def chance_of_rise(values: Shaped[np.ndarray, "n"]) -> float:
  """Returns the share of orders of the values whose rank correlation with 0, 1, ... is as high.

  This is the one-sided p-value of `spearman(np.arange(n), values)`. All orders are tried of at most
  8 values, and 10,000 random orders (with a fixed seed) of more.
  """
  n = len(values)
  ranks = _ranks(values)
  if n <= _MOST_EXACT:
    orders = ranks[np.array(list(itertools.permutations(range(n))), int).reshape(-1, n)]
  else:
    orders = np.random.default_rng(0).permuted(np.tile(ranks, (10_000, 1)), axis=1)
  # Among orders of the same values, the correlation grows with the sum of products.
  as_high = int(np.sum(orders @ np.arange(n) >= ranks @ np.arange(n) - 1e-9))
  # The order itself counts among the sampled ones, so that the share is never 0.
  return as_high / len(orders) if n <= _MOST_EXACT else (as_high + 1) / (len(orders) + 1)
