"""Errors of statistics of text whose tokens depend on each other: the delete-one-block jackknife.

The blocks, which `recorded.blocks` makes, are stretches of text. Resampling single tokens would
take the tokens of a document for independent and give errors that are too small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float

from moe_jax.analysis.recorded import Recorded, blocks, rows_per_domain

BLOCKS = 10
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def without_each_block(recorded: Recorded) -> list[Bool[np.ndarray, "N"]]:
  """Returns, for each of at most `BLOCKS` blocks, which tokens lie outside of it.

  The list is empty if a domain has fewer than two rows.
  """
  count = min(BLOCKS, *rows_per_domain(recorded))
  if count < 2:
    return []
  block = blocks(recorded, count)
  return [block != i for i in range(count)]


def half_width(replicates: Float[np.ndarray, "B *shape"]) -> Float[np.ndarray, "*shape"]:
  """Returns half of the width of the 95 % interval of a statistic; infinite with B < 2.

  Args:
    replicates: The statistic without each of the B blocks.
  """
  count = len(replicates)
  if count < 2:
    return np.full(replicates.shape[1:], math.inf)
  deviations = replicates - replicates.mean(axis=0)
  error = np.sqrt((count - 1) / count * (deviations**2).sum(axis=0))
  return np.asarray(_T[min(count - 1, len(_T)) - 1] * error)


def replicates(
  masks: Sequence[Bool[np.ndarray, "N"]],
  statistic: Callable[[Bool[np.ndarray, "N"]], np.ndarray],
  shape: tuple[int, ...],
) -> Float[np.ndarray, "B ..."]:
  """Returns a statistic of the tokens of each of B masks; `shape` is that of the statistic."""
  return np.array([statistic(mask) for mask in masks], float).reshape(len(masks), *shape)
