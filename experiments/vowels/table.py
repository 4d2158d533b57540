"""Makes the README's tables from results.json."""

from __future__ import annotations

import pathlib
import statistics
from typing import Any

from experiments.common import tables
from experiments.common.findings import FAILS, HOLDS, PARTLY, Finding
from experiments.vowels import study

README = pathlib.Path(__file__).resolve().parent / "README.md"
# Table 1 of the paper: train %, test %, epochs, and their standard deviation.
PAPER = {
  "4 experts": (88, 90, 1124, 23),
  "8 experts": (88, 90, 1083, 12),
  "BP 6 hidden": (88, 90, 2209, 83),
  "BP 12 hidden": (88, 90, 2435, 124),
}
COLUMNS = (
  "parameters",
  "train %",
  "test %",
  "epochs",
  "SD",
  "reached",
  "step size",
  "experts in use",
)


def table(results: dict[str, Any]) -> str:
  """Returns the paper's table, ours under each condition with t-tests, and the three errors."""
  parts = [
    "**Table 1 of the paper**\n\n"
    + _markdown(
      "model",
      ("train %", "test %", "epochs", "SD"),
      {name: [str(value) for value in row] for name, row in PAPER.items()},
    )
  ]
  for name, rows in results["conditions"].items():
    parts.append(
      f"**{name}**\n\n"
      + _markdown("model", COLUMNS, {m: _cells(m, row) for m, row in rows.items()})
      + "\n\n"
      + tests(rows)
    )
  parts.append(
    "**the three errors, 4 experts, pairs**\n\n"
    + _markdown("error", COLUMNS, {m: _cells(m, row) for m, row in results["errors"].items()})
  )
  versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
  parts.append(
    f"{study.SEEDS} seeds a row; epochs and SD are those of the runs that reached the criterion. "
    f"{results['seconds']:.0f} s of wall clock and {results['cpu_seconds']:.0f} s of CPU in all, "
    f"on {results['hardware']}; {versions}."
  )
  return "\n\n".join(parts)


def tests(rows: dict[str, Any]) -> str:
  """Returns one line of t-tests of epochs between models, first minus second."""
  sentences = []
  for first, second in study.PAIRS:
    if not all(rows[first]["reached"] + rows[second]["reached"]):
      sentences.append(f"{first} against {second}: none, runs without the criterion")
      continue
    test = study.t_test(rows[first]["epochs"], rows[second]["epochs"])
    p = f"p = {test['p']:.2g}" if test["p"] >= 1e-4 else "p < 0.0001"
    sentences.append(f"{first} against {second}: t({test['df']}) = {test['t']:+.1f}, {p}")
  return "Epochs, two-sided: " + "; ".join(sentences) + "."


def findings(results: dict[str, Any]) -> list[Finding]:
  """Returns the paper's finding and our verdict under each condition, for docs/findings.md.

  It holds if mixtures of 4 need at most two thirds of the epochs of 6 hidden units, and the
  t-test's p is below 0.05; the paper's ratio is 0.51.
  """
  ratios = {}
  for name, rows in results["conditions"].items():
    mixture, other = rows["4 experts"], rows["BP 6 hidden"]
    if all(mixture["reached"] + other["reached"]):
      ratio = statistics.fmean(mixture["epochs"]) / statistics.fmean(other["epochs"])
      p = study.t_test(mixture["epochs"], other["epochs"])["p"]
      ratios[name] = ratio, ratio <= 2 / 3 and p < 0.05
  holds = [held for _, held in ratios.values()]
  return [
    Finding(
      "Jacobs et al. (1991), Table 1",
      "Mixtures of 4 experts need half the epochs of 6 hidden units",
      f"{PAPER['4 experts'][2] / PAPER['BP 6 hidden'][2]:.2f} of the epochs",
      "; ".join(f"{name}: {ratio:.2f}" for name, (ratio, _) in ratios.items()),
      HOLDS if all(holds) else PARTLY if any(holds) else FAILS,
      "it depends on the initial weights, which the paper does not give",
    )
  ]


def _cells(name: str, row: dict[str, Any]) -> list[str]:
  epochs = [n for n, reached in zip(row["epochs"], row["reached"], strict=True) if reached]
  mean, deviation = (
    (statistics.fmean(epochs), statistics.stdev(epochs)) if len(epochs) > 1 else (float("nan"),) * 2
  )
  used = ", ".join(f"{n} in {row['in_use'].count(n)}" for n in sorted(set(row["in_use"])))
  return [
    str(row["parameters"]),
    *(f"{100 * statistics.fmean(row[part]):.0f}" for part in ("train", "test")),
    f"{mean:.0f}",
    f"{deviation:.0f}",
    f"{len(epochs)}/{len(row['epochs'])}",
    f"{row['step_size']:.3g}",
    "" if name.startswith("BP") else used,
  ]


def _markdown(corner: str, columns, rows: dict[str, list[str]]) -> str:
  return tables.markdown([corner, *columns], [[name, *cells] for name, cells in rows.items()])
