"""Summarises a finished row: which seeds were stable, their quality, and the router's logits."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.common import journal, outcomes
from experiments.st_moe_stability.stability import is_unstable

# The curves of `train` in a line of results that the study reads.
CURVES = ("step", "cross_entropy", "logit_max")
MEASURES = ("mean_nats_per_target", "mean_bits_per_byte")


@dataclasses.dataclass(frozen=True)
class Mean:
  """A mean over seeds, or the difference of two means, with its standard error.

  Attributes:
    value: The mean, or NaN if there is no seed.
    error: The standard error, or NaN for fewer than two seeds.
  """

  value: float
  error: float

  @classmethod
  def of(cls, values: Sequence[float]) -> Mean:
    """Returns the mean over independent seeds, which is NaN if there is none."""
    if not values:
      return cls(math.nan, math.nan)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return cls(statistics.fmean(values), error)

  def minus(self, other: Mean) -> Mean:
    """Returns the difference; its error is the root of the sum of both squared errors."""
    return Mean(self.value - other.value, math.hypot(self.error, other.error))

  @property
  def sign(self) -> int | None:
    """The sign of a value more than two standard errors from 0, else 0; None without an error."""
    if math.isnan(self.error):
      return None
    return 0 if abs(self.value) <= 2 * self.error else int(math.copysign(1, self.value))


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What the N seeds of a row came to over T steps.

  Attributes:
    stable: Whether each seed was stable.
    quality: The quality of each seed at the end: minus the measure, so that more is better. None
      stands for a measure that is not finite.
    logits: The largest magnitude of a router logit of each seed, over all steps and layers.
    losses: [N][T], the cross-entropy of each step in nats. None stands for one that is not finite.
    logit_curves: [N][T], the largest magnitude of a router logit at each step.
    steps: [T], the numbers of the steps.
  """

  stable: tuple[bool, ...]
  quality: tuple[float | None, ...]
  logits: tuple[float, ...]
  losses: Sequence[Sequence[float | None]]
  logit_curves: Sequence[Sequence[float | None]]
  steps: Sequence[int]

  @property
  def mean(self) -> Mean:
    """The mean quality of the stable seeds."""
    return Mean.of([value for value, good in zip(self.quality, self.stable, strict=True) if good])

  @property
  def count(self) -> str:
    """The stable seeds over all seeds, as the paper's tables print them, e.g. "4/6"."""
    return f"{sum(self.stable)}/{len(self.stable)}"


def outcome(line: Mapping[str, Any]) -> Outcome:
  """Returns what a finished row came to.

  A seed is unstable if it diverged or if its cross-entropy is unstable (`is_unstable`). The loss
  itself is not used, because it contains auxiliary losses that rows weigh differently.

  Args:
    line: A line of results of `experiments.common.seeds`, run with train.log_every=1.
  """
  train = line["train"]
  measure = next(name for name in MEASURES if name in line)

  def finite(values):
    return [value for value in values if value is not None]

  stable = tuple(
    step is None and value is not None and not is_unstable(losses)
    for step, value, losses in zip(
      line["diverged"], line[measure], train["cross_entropy"], strict=True
    )
  )
  return Outcome(
    stable,
    tuple(None if value is None else -value for value in line[measure]),
    tuple(max(finite(values), default=math.nan) for values in train["logit_max"]),
    train["cross_entropy"],
    train["logit_max"],
    train["step"],
  )


def describe(line: journal.Line, words: str) -> str:
  """Returns in words how many seeds were stable, their measure, and the largest router logit.

  Args:
    line: A line of results of any scale.
    words: What `outcomes.describe` says of it, see `stable_values`.
  """
  if "train" not in line:  # a run of moe_jax.train, or one that diverged in all seeds
    return words
  result = outcome(line)
  largest = max((value for value in result.logits if not math.isnan(value)), default=math.nan)
  return f"stable {result.count}; {words}; largest router logit {largest:.3g}"


def stable_values(line: journal.Line) -> list[float | None]:
  """Returns the measure of each stable seed, and None for the others."""
  if "train" not in line:
    return outcomes.values(line)
  result = outcome(line)
  return [
    -value if stable and value is not None else None
    for value, stable in zip(result.quality, result.stable, strict=True)
  ]
