"""Makes the README's table from the journal of a search."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from typing import Any

from experiments.brainformer_search import search
from experiments.common import tables
from experiments.common.findings import FAILS, HOLDS, Finding
from moe_jax.assembly.sublayers import kind


def table(journal: Any) -> str:
  """Returns the finals of the best block and of GLaM's, the verdict, and how the search went."""
  head, trials = journal.lines["search"], journal.trials
  finals = _finals(journal)
  if not trials or min(map(len, finals.values())) < 2:
    return f"{len(trials)} trials are finished; the same command goes on from there."
  columns = (
    "block",
    "bits per byte, each seed",
    "mean",
    "standard deviation",
    "steps",
    "time of a step",
    "parameters, activated",
  )
  cells = []
  for name, words in (("best", "best found"), ("glam", "GLaM's")):
    runs = finals[name]
    bits = _bits(runs)

    def mean(key, runs=runs):
      return statistics.fmean(run[key] for run in runs)

    cells.append(
      [
        words,
        ", ".join(f"{b:.3f}" for b in bits),
        f"{statistics.fmean(bits):.3f}",
        _deviation(bits),
        f"{mean('steps'):.0f}",
        f"{mean('relative_step'):.2f} of GLaM's",
        f"{runs[0]['parameters'] / 1e6:.2f}M, {runs[0]['activated'] / 1e6:.2f}M",
      ]
    )
  made = tables.markdown(columns, cells, "|---|---|---:|---:|---:|---:|---:|")
  return "\n".join([made, "", verdict(finals), "", _search_words(journal), "", _facts(head)])


def verdict(finals: dict[str, list[dict[str, Any]]]) -> str:
  """Returns in words whether the best block is ahead of GLaM's by more than the seeds' spread."""
  bits = {name: _bits(runs) for name, runs in finals.items()}
  ahead = statistics.fmean(bits["glam"]) - statistics.fmean(bits["best"])
  if max(bits["best"]) < min(bits["glam"]):
    words = "ahead: each of its seeds is below each of GLaM's"
  elif min(bits["best"]) > max(bits["glam"]):
    words = "behind: each of its seeds is above each of GLaM's"
  else:
    words = "neither ahead nor behind: the seeds of the two overlap"
  difference = f"difference of the means {ahead:+.3f} bits per byte, above 0: ahead"
  return f"The best block found is {words} ({difference})."


def findings(journal: Any) -> list[Finding]:
  """Returns the paper's finding and our verdict, for docs/findings.md."""
  finals = _finals(journal)
  if min(map(len, finals.values())) < 2:
    return []
  bits = {name: _bits(runs) for name, runs in finals.items()}
  ahead = statistics.fmean(bits["glam"]) - statistics.fmean(bits["best"])
  return [
    Finding(
      "Brainformers (2023), Sec. 4",
      "A block found by evolution is better than GLaM's after the same training time",
      "–",
      f"{ahead:+.3f} bits per byte ahead (standard deviations {_deviation(bits['best'])} and "
      f"{_deviation(bits['glam'])}, 3 seeds)",
      HOLDS if max(bits["best"]) < min(bits["glam"]) else FAILS,
      "because its steps are faster",
    )
  ]


def _finals(journal: Any) -> dict[str, list[dict[str, Any]]]:
  """Returns the runs of the best block and of GLaM's that end the search."""
  return {
    name: [line for row, line in sorted(journal.lines.items()) if row.startswith(f"final_{name}_")]
    for name in ("best", "glam")
  }


def _bits(runs: list[dict[str, Any]]) -> list[float]:
  """Returns the held-out bits per byte of each run, infinite if it diverged."""
  return [math.inf if run["bits_per_byte"] is None else run["bits_per_byte"] for run in runs]


def _deviation(bits: list[float]) -> str:
  return f"{statistics.stdev(bits):.3f}" if all(map(math.isfinite, bits)) else "-"


def _search_words(journal: Any) -> str:
  trials = journal.trials
  chosen = search.best(journal.done, [line["relative_step"] for line in trials])
  block = tuple(journal.lines["final_best_1"]["block"])
  counts = Counter(map(kind, block))
  ahead = sum(line["reward"] > 0 for line in trials)
  where = (
    "none was as fast as GLaM's and not stopped, so that GLaM's stands for it"
    if chosen is None
    else (f"the best, trial {chosen}, with {trials[chosen]['reward']:+.3f} bits per byte")
  )
  stopped = sum(line["stopped"] for line in trials)
  return (
    f"{len(trials)} trials, {stopped} of them stopped at a quarter, {ahead} above GLaM's in their "
    f"one seed; {where}. It has {counts['attention']} attention, {counts['ffn']} dense FFN and "
    f"{counts['moe']} MoE sublayers:\n\n" + "\n".join(f"    {entry}" for entry in block)
  )


def _facts(head: dict[str, Any]) -> str:
  machine = f"{head['cores']} CPU cores; Python {head['python']}, {tables.versions(head)}"
  return f"{head['date']}, {machine}."
