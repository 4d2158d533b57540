"""Turns lines of results.jsonl into means over seeds and comparisons with the dense twin."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.compare_routers import study

# Row -> its line of results.jsonl, whose fields experiments/common/seeds.py explains.
Lines = Mapping[str, Mapping[str, Any]]

LAST = 0.2  # the share of the logged steps, at the end, over which routing is averaged
ERRORS = 2.0  # the standard errors that a difference has to exceed
# The two-sided 5% point of Student's t with the 2 degrees of freedom of 3 seeds.
T_5_PERCENT = 4.303


class Mean(NamedTuple):
  """A mean over seeds and its standard error.

  Attributes:
    mean: The mean, or None if there is no seed.
    error: The sample deviation over sqrt(n), or None for fewer than two seeds.
  """

  mean: float | None
  error: float | None


class Difference(NamedTuple):
  """The bits per byte of one row minus those of another, seed by seed.

  Attributes:
    mean: The mean over the seeds that are finite in both rows, or None if there is none.
    error: Its standard error, or None for fewer than two seeds.
    exceeds: Whether all seeds are finite in both rows, |mean| > 2 errors, and all differences have
      the same sign.
    errors: |mean| / error. None if there is no error, and inf if it is 0.
  """

  mean: float | None
  error: float | None
  exceeds: bool
  errors: float | None


def mean(values: Sequence[float]) -> Mean:
  """Returns mean and standard error of the values of some seeds."""
  if not values:
    return Mean(None, None)
  return Mean(
    statistics.fmean(values),
    statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None,
  )


def finite(line: Mapping[str, Any]) -> list[int]:
  """Returns the seeds whose loss was finite at every step and is so at the end."""
  bits = line.get("mean_bits_per_byte", [])
  return [
    seed for seed, value in enumerate(bits) if value is not None and line["diverged"][seed] is None
  ]


def bits(line: Mapping[str, Any]) -> Mean:
  """Returns the validation bits per byte over the finite seeds, averaged over the sources."""
  return mean([line["mean_bits_per_byte"][seed] for seed in finite(line)])


def difference(line: Mapping[str, Any], other: Mapping[str, Any]) -> Difference:
  """Returns the bits per byte of `line` minus those of `other`, paired by seed."""
  pairs = sorted(set(finite(line)) & set(finite(other)))
  values = [line["mean_bits_per_byte"][seed] - other["mean_bits_per_byte"][seed] for seed in pairs]
  average = mean(values)
  if average.error is None:
    return Difference(*average, exceeds=False, errors=None)
  errors = abs(average.mean) / average.error if average.error else math.inf
  one_sign = all(value > 0 for value in values) or all(value < 0 for value in values)
  return Difference(
    *average, exceeds=len(pairs) == study.SEEDS and errors > ERRORS and one_sign, errors=errors
  )


def pairs(lines: Lines) -> dict[tuple[str, str], Difference]:
  """Returns the difference of each pair: (row, later row) -> the first minus the second."""
  return {(a, b): difference(lines[a], lines[b]) for a, b in itertools.combinations(lines, 2)}


def curve(line: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
  """Returns the validation curve during training.

  Returns:
    The steps [T'], and the bits per byte [n, T'] of the n finite seeds.
  """
  values = np.array(line["eval"]["bits_per_byte"], float) if finite(line) else np.empty((0, 0))
  return np.array(line.get("eval", {}).get("step", ()), float), values[finite(line)]


def steps_to(line: Mapping[str, Any], target: float) -> float | None:
  """Returns the step at which the seeds' mean validation curve first reaches `target`.

  The step is interpolated linearly between two evaluations. It is that of the first evaluation if
  the curve starts at the target or below, and None if it never gets there.
  """
  steps, values = curve(line)
  if not values.size:
    return None
  means = values.mean(axis=0)
  # The tolerance allows for the order of summation in the two means.
  below = np.flatnonzero(means <= target + 1e-9)
  if not len(below):
    return None
  i = below[0]
  if i == 0:
    return float(steps[0])
  share = (means[i - 1] - target) / (means[i - 1] - means[i])
  return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))


def late(line: Mapping[str, Any], name: str) -> float | None:
  """Returns a figure of the training curves at the end, or None if the line does not have it.

  It is the mean over the finite seeds and the last fifth of the logged steps.
  """
  if name not in line.get("train", {}) or not finite(line):
    return None
  values = np.array(line["train"][name], float)[finite(line)]
  count = max(round(LAST * values.shape[1]), 1)
  return float(values[:, -count:].mean())


def largest(line: Mapping[str, Any], name: str) -> float | None:
  """Returns the largest finite value of a training curve over seeds and steps, or None."""
  values = [
    value for seed in line.get("train", {}).get(name, ()) for value in seed if value is not None
  ]
  return max(values, default=None)


def summary(lines: Lines) -> dict[str, dict[str, Any]]:
  """Returns row -> the figures that the tables show of it.

  README.md explains each figure. None stands for a figure that the row does not have.
  """
  dense = lines.get(study.DENSE)
  target = bits(dense).mean if dense else None
  return {
    name: _quality(line, dense, target) | _routing(name, line) | _cost(line, dense)
    for name, line in lines.items()
  }


def seconds_a_step(line: Mapping[str, Any]) -> float | None:
  """Returns the seconds that a step of one seed takes, or None if they are not known.

  They are CPU time on a CPU, because other work may have shared the cores, and wall time elsewhere.
  """
  return line.get("step_cpu_seconds" if "cpu" in line.get("hardware", "") else "step_seconds")


def _quality(
  line: Mapping[str, Any], dense: Mapping[str, Any] | None, target: float | None
) -> dict[str, Any]:
  mine = bits(line)
  against = difference(line, dense) if dense and line is not dense else None
  steps = steps_to(line, target) if target is not None else None
  seconds = seconds_a_step(line)
  return {
    "bits_per_byte": mine.mean,
    "bits_per_byte_se": mine.error,
    "minus_dense": against and against.mean,
    "minus_dense_se": against and against.error,
    "exceeds_seeds_spread": against and against.exceeds,
    "steps_to_dense": steps,
    "seconds_to_dense": steps * seconds if steps and seconds else None,
    "finite_seeds": len(finite(line)),
    "seeds": line.get("seeds", study.SEEDS),
  }


def _routing(name: str, line) -> dict[str, Any]:
  group = study.group_of(name)
  figures = {key: late(line, key) for key in ("drop_rate", "dropped_tokens", "load_cv")}
  figures["router_entropy"] = None if name in study.UNREAD else late(line, "entropy")
  figures["ln_experts"] = math.log(group.experts) if group else None
  figures["logit_max"] = None if name in study.UNREAD else largest(line, "logit_max")
  return figures


def _cost(line: Mapping[str, Any], dense: Mapping[str, Any] | None) -> dict[str, Any]:
  seconds, dense_seconds = seconds_a_step(line), seconds_a_step(dense) if dense else None
  figures = {
    short: 1000 * line[key] if line.get(key) else None
    for key, short in (("step_seconds", "step_ms"), ("step_cpu_seconds", "step_cpu_ms"))
  }
  figures["step_over_dense"] = seconds / dense_seconds if seconds and dense_seconds else None
  counts = line.get("parameters", {})
  return figures | {
    "parameters": counts.get("total"),
    "activated_parameters": counts.get("activated"),
    "flops_per_token": line.get("flops_per_token"),
  }
