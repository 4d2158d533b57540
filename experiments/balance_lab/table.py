"""Makes the README's tables and figures from drift.jsonl and results.jsonl."""

from __future__ import annotations

import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.balance_lab import drift, study
from experiments.common import journal, outcomes, plots
from experiments.common import tables as common
from moe_jax.report.charts import Line, line_file

HERE = pathlib.Path(__file__).resolve().parent
README, RESULTS = HERE / "README.md", HERE / "results.jsonl"
LAST = 0.2  # the share of the logged steps, at the end, over which a steady violation is averaged
Lines = Mapping[str, Mapping[str, Any]]


def best(lines: Lines) -> dict[str, Mapping[str, Any]]:
  """Returns each method's line at the rate with the smallest violation while the skew drifts."""
  chosen: dict[str, Mapping[str, Any]] = {}
  for method in drift.RATES:
    tried = [line for line in lines.values() if line["method"] == method]
    if tried:
      chosen[method] = min(tried, key=lambda line: _mean(line, "walking"))
  return chosen


def drift_table(lines: Lines) -> str:
  """Returns the table of the simulation."""
  if not lines:
    return "The simulation has not been run yet."
  head = (
    "method",
    "rate",
    "steps to balance",
    "still",
    "drifting",
    "steps after a jump",
    "step, us",
  )
  rows = [
    [
      f"`{method}`",
      "–" if line["rate"] is None else f"{line['rate']:g}",
      _steps(line, "steps"),
      _value(line, "still"),
      _value(line, "walking"),
      _steps(line, "after"),
      f"{line['microseconds']:,.0f}",
    ]
    for method, line in best(lines).items()
  ]
  about = next(iter(lines.values()))
  return common.markdown(head, rows) + (
    f"\n\nMean ± standard deviation of {len(about['seeds'])} seeds. Steps until the max violation "
    f"of a batch is below {drift.BALANCED:g} (from the start, and after all logits jumped at step "
    f"{drift.AGAIN[0]}; – means that a seed never got there), and the mean max violation of the "
    f"last {drift.LAST} steps while the skew stands still and while it drifts. The rate is the "
    f"best of four by the column drifting. {about['date']}, Python {about['python']}, "
    f"jax {about['jax']}, {about['hardware']}.\n\n"
    "![max violation in each step of the simulation](drift.svg)"
  )


def model_table(lines: Lines) -> str:
  """Returns the table of the trained model."""
  if not lines:
    return "No row is finished yet."
  head = (
    "row",
    "bits per byte",
    "minus `none`",
    "steps to balance",
    "steady violation",
    "largest logit",
    "CPU of a step",
  )
  base = lines.get(study.NONE)
  rows = []
  for name, line in lines.items():
    bits = [value for value in outcomes.values(line) if value is not None]
    curve = np.array(line["train"]["max_violation"], float)
    late = curve[:, -max(round(LAST * curve.shape[1]), 1) :].mean(axis=1)
    reached = [drift.first_below(each) for each in curve]
    rows.append(
      [
        f"`{name}`",
        _spread(bits, 3),
        _paired(line, base) if base and name != study.NONE else "",
        "–"
        if any(map(math.isinf, reached))
        else _spread([line["train"]["step"][int(i)] for i in reached], 0),
        _spread(late, 3),
        f"{max(max(seed) for seed in line['train']['logit_max']):.1f}",
        f"{line['step_cpu_seconds'] / base['step_cpu_seconds']:.2f}" if base else "",
      ]
    )
  first = next(iter(lines.values()))
  seconds = sum(line["wall_seconds"] for line in lines.values())
  return common.markdown(head, rows) + (
    f"\n\nMean ± standard deviation of {first['seeds']} seeds; differences are paired by seed, "
    "with their standard error. The max violation is a mean over layers, of training batches; – "
    f"means that a seed was never below {drift.BALANCED:g}. {first['steps']} steps of "
    f"{first['tokens'] // first['steps']:,} tokens, {seconds / 60:.0f} minutes summed over rows. "
    f"{first['date']}, Python {first['python']}, {common.versions(first)}, {first['hardware']}.\n\n"
    "![max violation over training](model.svg)"
  )


def draw() -> None:
  """Writes the figures for which there are results."""
  if simulated := journal.load(drift.RESULTS):
    lines = [
      Line(method, np.arange(len(line["curve"])), np.array(line["curve"]), colour)
      for (method, line), colour in zip(best(simulated).items(), _colours(), strict=False)
    ]
    (HERE / "drift.svg").write_text(
      line_file(
        "max violation of each batch, mean over seeds", lines, log=True, height=380, width=760
      )
    )
  if trained := ordered():
    lines = [
      Line(
        name,
        np.array(line["train"]["step"], float),
        np.array(line["train"]["max_violation"], float).mean(axis=0),
        colour,
      )
      for (name, line), colour in zip(trained.items(), _colours(), strict=False)
    ]
    (HERE / "model.svg").write_text(
      line_file(
        "max violation of training batches, mean over layers and seeds",
        lines,
        log=True,
        height=380,
        width=760,
      )
    )


def ordered() -> dict[str, Mapping[str, Any]]:
  """Returns the finished rows in the order of the study."""
  lines = journal.load(RESULTS)
  return {name: lines[name] for name in study.rows() if name in lines}


def tables() -> dict[str, str]:
  """Returns the README's tables, by marker."""
  return {"drift": drift_table(journal.load(drift.RESULTS)), "model": model_table(ordered())}


def _colours() -> Sequence[str]:
  """Returns as many colours as a table has rows: the studies', then darker ones and greys."""
  return (*plots.COLOURS, "#004466", "#7a3500", "#005c44", "#7d3a5e", "#7a5200", "#2a5d78", *_GREYS)


_GREYS = ("#000000", "#555555", "#888888", "#aaaaaa")


def _mean(line: Mapping[str, Any], name: str) -> float:
  return statistics.fmean(seed[name] for seed in line["seeds"])


def _value(line: Mapping[str, Any], name: str) -> str:
  return _spread([seed[name] for seed in line["seeds"]], 3)


def _steps(line: Mapping[str, Any], name: str) -> str:
  values = [seed[name] for seed in line["seeds"]]
  return "–" if None in values else _spread(values, 0)


def _spread(values: Sequence[float] | np.ndarray, digits: int) -> str:
  deviation = statistics.stdev(map(float, values)) if len(values) > 1 else math.nan
  return f"{statistics.fmean(map(float, values)):.{digits}f} ± {deviation:.{digits}f}"


def _paired(line: Mapping[str, Any], other: Mapping[str, Any]) -> str:
  pairs = zip(outcomes.values(line), outcomes.values(other), strict=True)
  differences = [a - b for a, b in pairs if a is not None and b is not None]
  mean, error = outcomes.mean_and_error(differences)
  return f"{mean:+.3f} ± {error:.3f}"
