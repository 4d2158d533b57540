"""What a finished row came to, in one sentence for the terminal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from experiments.common import journal
from moe_jax.training.evaluate import MEASURES

Values = Callable[[journal.Line], Sequence[float | None]]


def measure(line: journal.Line) -> tuple[str, str] | None:
  """Returns the name and the unit of what a row is judged by, or None if its line has neither."""
  return next(
    ((name, unit) for name, unit in MEASURES.values() if name in line or f"mean_{name}" in line),
    None,
  )


def values(line: journal.Line) -> list[float | None]:
  """Returns the final held-out measure of each seed, averaged over the sources; lower is better.

  None stands for a seed that diverged.
  """
  name_and_unit = measure(line)
  if name_and_unit is None:
    return []
  name, _ = name_and_unit
  if f"mean_{name}" not in line:
    return [statistics.fmean(line[name].values())]
  diverged = line.get("diverged") or [None] * len(line[f"mean_{name}"])
  return [
    None if step is not None else value
    for step, value in zip(diverged, line[f"mean_{name}"], strict=True)
  ]


def mean_and_error(numbers: Sequence[float]) -> tuple[float, float]:
  """Returns the mean and its standard error, which is NaN for fewer than two numbers."""
  error = statistics.stdev(numbers) / math.sqrt(len(numbers)) if len(numbers) > 1 else math.nan
  return statistics.fmean(numbers), error


def describe(
  line: journal.Line,
  others: dict[str, journal.Line],
  counted: Values = values,
  paired: bool = False,
) -> str:
  """Returns what a row came to: its quality, and its difference to other rows.

  Args:
    line: The row's line of results.
    others: Words for another row -> that row's line. The row is compared with each of them.
    counted: Returns the measure of each seed of a line, and None for seeds that do not count
      because they diverged or are unstable.
    paired: Whether seed i of two rows is compared with seed i. Otherwise the difference of the
      means has the root of the sum of both squared standard errors.
  """
  if "error" in line:
    return str(line["error"])
  if isinstance(line.get("diverged"), str):
    return line["diverged"]
  name_and_unit = measure(line)
  if name_and_unit is None:
    return "finished"
  unit, mine = name_and_unit[1], counted(line)
  finite = [value for value in mine if value is not None]
  if not finite:
    unstable = ", ".join(f"{value:.3f}" for value in values(line) if value is not None)
    return f"no seed is stable, {unstable} {unit}" if unstable else "all seeds diverged"
  words = [f"{_number(*mean_and_error(finite))} {unit}"]
  if len(mine) > 1:
    words[0] += f" over {len(finite)} of {len(mine)} seeds"
  for name, other in others.items():
    if measure(other) == name_and_unit:
      difference = _difference(mine, counted(other), paired)
      if difference is not None:
        words.append(f"{_number(*difference, signed=True)} compared with {name}")
  return "; ".join(words)


def _difference(
  mine: Sequence[float | None], theirs: Sequence[float | None], paired: bool
) -> tuple[float, float] | None:
  """Returns the difference and its standard error, or None if a row has no finite seed."""
  if paired:
    pairs = [a - b for a, b in zip(mine, theirs, strict=False) if a is not None and b is not None]
    return mean_and_error(pairs) if pairs else None
  mine = [value for value in mine if value is not None]
  theirs = [value for value in theirs if value is not None]
  if not mine or not theirs:
    return None
  (a, a_error), (b, b_error) = mean_and_error(mine), mean_and_error(theirs)
  return a - b, math.hypot(a_error, b_error)


def _number(value: float, error: float, signed: bool = False) -> str:
  text = f"{value:{'+' if signed else ''}.3f}"
  return text if math.isnan(error) else f"{text} ± {error:.3f}"
