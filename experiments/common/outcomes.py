"""What a finished row came to, in one sentence for the terminal, and how rows compare."""

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

  A row that was trained for another number of steps or tokens, or measured on another text, does
  not compare: the reason stands in place of the difference.

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
  words = [f"{quality(line, counted)} {unit}"]
  if len(mine) > 1:
    words[0] += f" over {len(finite)} of {len(mine)} seeds"
  for name, other in others.items():
    if measure(other) != name_and_unit:
      continue
    if reason := unlike(line, other):
      words.append(f"not compared with {name}, {reason}")
    elif shown := difference(line, other, counted, paired):
      words.append(f"{shown} compared with {name}")
  return "; ".join(words)


def unlike(line: journal.Line, other: journal.Line) -> str:
  """Returns why the measures of two lines do not compare, as a clause about `other`, or ""."""
  for unit in ("steps", "tokens"):
    mine, theirs = line.get(unit), other.get(unit)
    if mine is not None and theirs is not None and mine != theirs:
      return f"which has {theirs:,} {unit} and not {mine:,}"
  mine, theirs = line.get("data"), other.get("data")
  if mine is not None and theirs is not None and mine != theirs:
    return "which was trained on another version of the text"
  return ""


def quality(line: journal.Line, counted: Values = values) -> str:
  """Returns the mean measure of the seeds that count, and its error, or "" if there is none."""
  finite = [value for value in counted(line) if value is not None]
  return _number(*mean_and_error(finite)) if finite else ""


def difference(
  line: journal.Line, other: journal.Line, counted: Values = values, paired: bool = False
) -> str:
  """Returns the difference of two lines with its error, or "" if they do not compare.

  Args:
    line: A row's line of results.
    other: The line that is subtracted.
    counted: See `describe`.
    paired: See `describe`.
  """
  if measure(line) is None or measure(line) != measure(other) or unlike(line, other):
    return ""
  found = _difference(counted(line), counted(other), paired)
  return "" if found is None else _number(*found, signed=True)


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
