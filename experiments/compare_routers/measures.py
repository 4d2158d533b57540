"""What lines of results.jsonl come to: means and standard errors over seeds, and comparisons with
the dense twin."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.compare_routers import study

Lines = Mapping[
  str, Mapping[str, Any]
]  # row -> its line of results.jsonl, see experiments/common/seeds.py

LAST = 0.2  # of the logged steps: where routing is averaged over
ERRORS = 2.0  # standard errors that a difference exceeds
# The two-sided 5 % point of Student's t with 2 degrees of freedom, which is what 3 seeds have.
T_5_PERCENT = 4.303


class Mean(NamedTuple):
  """A mean over seeds and its standard error (sample deviation / sqrt(n)), None where there are too
  few seeds."""

  mean: float | None
  error: float | None


class Difference(NamedTuple):
  """Bits per byte of one row minus another's, seed by seed.

  Attributes:
    mean, error: as `Mean`, over the seeds that are finite in both rows.
    exceeds: all seeds are finite in both rows, |mean| > 2 errors and all have the same sign.
    errors: |mean| / error; None where there is no error, inf where it is 0.
  """

  mean: float | None
  error: float | None
  exceeds: bool
  errors: float | None


def mean(values: Sequence[float]) -> Mean:
  """Of what is left of the seeds."""
  if not values:
    return Mean(None, None)
  return Mean(
    statistics.fmean(values),
    statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None,
  )


def finite(line: Mapping[str, Any]) -> list[int]:
  """The seeds that were finite at every step and are at the end."""
  bits = line.get("mean_bits_per_byte", [])
  return [
    seed for seed, value in enumerate(bits) if value is not None and line["diverged"][seed] is None
  ]


def bits(line: Mapping[str, Any]) -> Mean:
  """Validation bits per byte, the mean over sources, over the finite seeds."""
  return mean([line["mean_bits_per_byte"][seed] for seed in finite(line)])


def difference(line: Mapping[str, Any], other: Mapping[str, Any]) -> Difference:
  """`line` minus `other`, paired by seed."""
  pairs = sorted(set(finite(line)) & set(finite(other)))
  values = [line["mean_bits_per_byte"][seed] - other["mean_bits_per_byte"][seed] for seed in pairs]
  found = mean(values)
  if found.error is None:
    return Difference(*found, exceeds=False, errors=None)
  errors = abs(found.mean) / found.error if found.error else math.inf
  one_sign = all(value > 0 for value in values) or all(value < 0 for value in values)
  return Difference(
    *found, exceeds=len(pairs) == study.SEEDS and errors > ERRORS and one_sign, errors=errors
  )


def pairs(lines: Lines) -> dict[tuple[str, str], Difference]:
  """(row, a later row) -> the first minus the second; of every pair."""
  return {(a, b): difference(lines[a], lines[b]) for a, b in itertools.combinations(lines, 2)}


def curve(line: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
  """(steps [T'], bits per byte [n, T'] of the finite seeds): what was evaluated during training."""
  values = np.array(line["eval"]["bits_per_byte"], float) if finite(line) else np.empty((0, 0))
  return np.array(line.get("eval", {}).get("step", ()), float), values[finite(line)]


def steps_to(line: Mapping[str, Any], target: float) -> float | None:
  """The step at which the seeds' mean validation curve first is at `target` or below, interpolated
  linearly.

  None: it never is. The first evaluation's step where it is at once.
  """
  steps, values = curve(line)
  if not values.size:
    return None
  means = values.mean(axis=0)
  below = np.flatnonzero(means <= target + 1e-9)  # a mean may be rounded in two ways
  if not len(below):
    return None
  i = below[0]
  if i == 0:
    return float(steps[0])
  share = (means[i - 1] - target) / (means[i - 1] - means[i])
  return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))


def late(line: Mapping[str, Any], name: str) -> float | None:
  """A figure of `train`: mean over the finite seeds and the last fifth of the logged steps; None:
  it has none."""
  if name not in line.get("train", {}) or not finite(line):
    return None
  values = np.array(line["train"][name], float)[finite(line)]
  count = max(round(LAST * values.shape[1]), 1)
  return float(values[:, -count:].mean())


def largest(line: Mapping[str, Any], name: str) -> float | None:
  """The largest finite value of a figure of `train` over all seeds and steps; None: it has none."""
  values = [
    value for seed in line.get("train", {}).get(name, ()) for value in seed if value is not None
  ]
  return max(values, default=None)


def summary(lines: Lines) -> dict[str, dict[str, Any]]:
  """row -> what the table shows of it; README.md says what each figure is. None: there is no such
  figure."""
  dense = lines.get(study.DENSE)
  target = bits(dense).mean if dense else None
  return {
    name: _quality(line, dense, target) | _routing(name, line) | _cost(line, dense)
    for name, line in lines.items()
  }


def seconds_a_step(line: Mapping[str, Any]) -> float | None:
  """Of one seed: CPU time where a CPU computed, whose cores other work may have shared; elsewhere
  wall time."""
  return line.get("step_cpu_seconds" if "cpu" in line.get("hardware", "") else "step_seconds")


def _quality(line, dense, target) -> dict[str, Any]:
  own = bits(line)
  against = difference(line, dense) if dense and line is not dense else None
  steps = steps_to(line, target) if target is not None else None
  seconds = seconds_a_step(line)
  return {
    "bits_per_byte": own.mean,
    "bits_per_byte_se": own.error,
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
  found = {key: late(line, key) for key in ("drop_rate", "dropped_tokens", "load_cv")}
  found["router_entropy"] = None if name in study.UNREAD else late(line, "entropy")
  found["ln_experts"] = math.log(group.experts) if group else None
  found["logit_max"] = None if name in study.UNREAD else largest(line, "logit_max")
  return found


def _cost(line, dense) -> dict[str, Any]:
  own, other = seconds_a_step(line), seconds_a_step(dense) if dense else None
  found = {
    short: 1000 * line[key] if line.get(key) else None
    for key, short in (("step_seconds", "step_ms"), ("step_cpu_seconds", "step_cpu_ms"))
  }
  found["step_over_dense"] = own / other if own and other else None
  counts = line.get("parameters", {})
  return found | {
    "parameters": counts.get("total"),
    "activated_parameters": counts.get("activated"),
    "flops_per_token": line.get("flops_per_token"),
  }
