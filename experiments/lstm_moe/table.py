"""Makes the README's table and figure from results.jsonl and balance.jsonl."""

from __future__ import annotations

import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.common import journal, plots
from experiments.common import tables as common
from experiments.common.findings import FAILS, HOLDS, OPEN, Finding
from experiments.lstm_moe import study
from moe_jax.report.charts import Line, line_file

README = pathlib.Path(__file__).resolve().parent / "README.md"
RESULTS, BALANCE, FIGURE = (
  README.parent / name for name in ("results.jsonl", "balance.jsonl", "balance.svg")
)
# The columns of the table -> their decimals.
MEASURES = {"perplexity": 2, "cv_importance": 2, "cv_load": 2, "max_over_mean": 2}
HEAD = (
  "w_importance",
  "w_load",
  "perplexity",
  "CV(Importance)",
  "CV(Load)",
  "max/mean load",
  "the same without noise",
)


def runs() -> dict[tuple[float, float], list[dict[str, Any]]]:
  """Returns (w_importance, w_load) -> the results of each finished seed and its balance."""
  results, balance = journal.load(RESULTS), journal.load(BALANCE)
  by_weights = {}
  for weights in study.PAPER:
    names = [study.name(*weights, seed) for seed in range(study.SEEDS)]
    by_weights[weights] = [
      results[name] | balance[name] | {"perplexity": study.perplexity(results[name])}
      for name in names
      if name in balance
    ]
  return {weights: seeds for weights, seeds in by_weights.items() if seeds}


def table(finished: dict[tuple[float, float], list[dict[str, Any]]]) -> str:
  """Returns our table, with mean and standard deviation over seeds, and that of the paper."""
  if not finished:
    return "No run is finished."
  ours = [
    [f"{weight:g}" for weight in weights]
    + [_mean(seeds, key, digits) for key, digits in MEASURES.items()]
    + [_mean(seeds, "evaluated_max_over_mean", 2)]
    for weights, seeds in finished.items()
  ]
  paper = [
    [f"{weight:g}" for weight in weights]
    + [f"{row[0]:.1f}", *(f"{value:.2f}" for value in row[1:])]
    for weights, row in study.PAPER.items()
  ]
  every = [seed for seeds in finished.values() for seed in seeds]
  first = every[0]
  seconds = [run["wall_seconds"] for run in every]
  about = (
    f"Mean ± standard deviation of {min(map(len, finished.values()))} seeds. "
    f"Perplexity of a held-out byte; {study.EXPERTS} experts, 4 a token; {first['steps']} steps, "
    f"{first['tokens'] / 1e6:.1f}M tokens, {first['parameters']['total'] / 1e6:.2f}M parameters, "
    f"{first['parameters']['activated'] / 1e6:.2f}M activated. {sum(seconds) / 60:.0f} minutes of "
    f"training in all, {min(seconds):.0f} to {max(seconds):.0f} s a run. {first['date']}, Python "
    f"{first['python']}, {common.versions(first)}, {first['hardware']}."
  )
  theirs = "Table 6 of the paper: perplexity of a word, 256 experts, ten epochs of 829M words."
  return "\n\n".join([_markdown(HEAD, ours), about, theirs, _markdown(HEAD[:-1], paper)])


def figure(finished: dict[tuple[float, float], list[dict[str, Any]]]) -> str:
  """Returns an SVG of max/mean load of each logged training batch, averaged over seeds."""
  lines = []
  for colour, (weights, seeds) in zip(_colours(), finished.items(), strict=False):
    curves = np.array([seed["curve"] for seed in seeds])  # [seeds, T, 2]
    label = "({:g}, {:g})".format(*weights)
    lines.append(Line(label, curves[0, :, 0], curves[..., 1].mean(axis=0), colour))
  return line_file(
    "max/mean load of a training batch by (w_importance, w_load), mean over seeds", lines
  )


def _colours() -> tuple[str, ...]:
  """Returns the studies' colours with the first two exchanged: no losses are drawn in vermilion."""
  first, second, *rest = plots.COLOURS
  return second, first, *rest


def _mean(seeds: list[dict[str, Any]], key: str, digits: int) -> str:
  values = [seed[key] for seed in seeds]
  spread = statistics.stdev(values) if len(values) > 1 else float("nan")
  return f"{statistics.fmean(values):.{digits}f} ± {spread:.{digits}f}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  return common.markdown(head, rows, common.line(["---:"] * len(head)))


def findings() -> list[Finding]:
  """Returns the paper's findings and our verdicts, for docs/findings.md.

  The losses balance if the fullest expert has less load with both than without, by more than the
  seeds' ranges. Perplexity is not decided here, because the models have read too little for experts
  to matter.
  """
  finished = runs()
  without, both = finished.get((0.0, 0.0)), finished.get((0.1, 0.1))
  if not without or not both:
    return []
  loads = [[seed["max_over_mean"] for seed in seeds] for seeds in (both, without)]
  theirs = [study.PAPER[weights] for weights in ((0.1, 0.1), (0.0, 0.0))]
  return [
    Finding(
      "Shazeer et al. (2017), Table 6",
      "Losses of importance and load keep the fullest expert near the mean load",
      f"max/mean load {theirs[0][3]} against {theirs[1][3]}",
      f"{_mean(both, 'max_over_mean', 2)} against {_mean(without, 'max_over_mean', 2)}",
      HOLDS if max(loads[0]) < min(loads[1]) else FAILS,
    ),
    Finding(
      "Shazeer et al. (2017), Table 6",
      "They improve perplexity",
      f"{theirs[0][0]} against {theirs[1][0]} of a word",
      f"{_mean(both, 'perplexity', 2)} against {_mean(without, 'perplexity', 2)} of a byte",
      OPEN,
      "0.8M tokens are a ten-thousandth of the paper's",
    ),
  ]


def draw() -> None:
  """Writes the figure, if a run is finished."""
  if finished := runs():
    FIGURE.write_text(figure(finished))
