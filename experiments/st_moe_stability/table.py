"""Makes the README's tables from results.jsonl and search.jsonl."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.common import tables as common
from experiments.st_moe_stability import findings, paper, rows, stability
from experiments.st_moe_stability.outcome import Outcome, outcome
from moe_jax.training.evaluate import MEASURES

README = pathlib.Path(__file__).resolve().parent / "README.md"
RESULTS, SEARCH = README.parent / "results.jsonl", README.parent / "search.jsonl"
# The tables of the README, each between <!-- table:NAME --> and <!-- /table:NAME -->.
PARTS = ("findings", "stability", "design", "search")
HEAD = (
  "row",
  "what it changes",
  "stable",
  "quality",
  "difference",
  "largest router logit",
  "paper: table",
  "paper: stable",
  "paper: quality",
  "paper: difference",
)
NOTHING = "No run is finished."
MEANING = (
  f"Quality is minus the {MEASURES['span_corruption'][1]} on held-out text, mean over the sources, "
  "and mean ± standard error over the stable seeds; a difference is to the first row unless its "
  "row names another. Logits: in any seed, step and layer."
)
# The figures of figures.py.
PICTURES = (
  "![loss curves of the baseline and of the z-losses](losses.png)",
  "![the router's largest logits](logits.png)",
)


def tables(
  lines: Mapping[str, Mapping[str, Any]], searched: Mapping[str, Mapping[str, Any]]
) -> dict[str, str]:
  """Returns the README's tables, a key of `PARTS` -> Markdown.

  Args:
    lines: Row -> its line of results.jsonl.
    searched: Row -> its line of search.jsonl.
  """
  outcomes = {name: outcome(line) for name, line in lines.items()}
  known = rows.ablations(rows.DESK)
  early = [name for name in known if not rows.is_design(name, known)]
  late = [name for name in known if rows.is_design(name, known)]

  def part(names: Sequence[str], before: Sequence[str] = (), after: Sequence[str] = ()) -> str:
    done = [lines[name] for name in names if name in lines]
    return "\n\n".join(
      [_rows(names, outcomes, known), *((*before, _ran(done), *after) if done else ())]
    )

  return {
    "findings": _findings(outcomes),
    "stability": part(early, (MEANING,), PICTURES),
    "design": part(late),
    "search": _search(searched),
  }


def _rows(
  names: Sequence[str], outcomes: Mapping[str, Outcome], known: Mapping[str, rows.Ablation]
) -> str:
  cells = [
    _cells(name, outcomes, known, first=name == names[0]) for name in names if name in outcomes
  ]
  return markdown(HEAD, cells) if cells else NOTHING


def _cells(
  name: str, outcomes: Mapping[str, Outcome], known: Mapping[str, rows.Ablation], first: bool
) -> list[str]:
  """Returns the cells of a row. The `first` row of a table is what the others start from."""
  mine, ablation = outcomes[name], known[name]
  against = "" if first else ablation.against
  words = ablation.words + (
    "" if against in ("", rows.BASELINE, rows.REFERENCE) else f", from `{against}`"
  )
  difference = (
    findings.text(mine.mean.minus(outcomes[against].mean), signed=True)
    if against in outcomes
    else ""
  )
  largest = max((value for value in mine.logits if not math.isnan(value)), default=math.nan)
  logit = "–" if math.isnan(largest) else f"{largest:.3g}"
  return [
    f"`{name}`",
    words,
    mine.count,
    findings.text(mine.mean),
    difference,
    logit,
    *_claim(name, against),
  ]


def _claim(name: str, against: str) -> list[str]:
  """Returns the cells with the paper's numbers for a row."""
  claim = paper.CLAIMS.get(name)
  if claim is None:
    return [""] * 4
  start = paper.STARTS.get(name, paper.CLAIMS[against].quality) if against else None
  error = "" if math.isnan(claim.error) else f" ± {claim.error:.2f}"
  return [
    claim.table,
    "" if claim.stable is None else f"{claim.stable}/{claim.total}",
    f"{claim.quality:.3f}{error}",
    "" if start is None else f"{claim.quality - start:+.3f}",
  ]


def _findings(outcomes: Mapping[str, Outcome]) -> str:
  cells = []
  for finding in findings.FINDINGS:
    if {finding.row, finding.against} <= outcomes.keys():
      verdict, numbers = findings.judge(finding, outcomes)
      cells.append(
        [
          finding.words,
          finding.table,
          f"`{finding.row}`, `{finding.against}`",
          numbers,
          f"**{verdict}**",
        ]
      )
  return (
    markdown(("the paper's finding", "table", "rows compared", "here", "verdict"), cells)
    if cells
    else NOTHING
  )


def _search(searched: Mapping[str, Mapping[str, Any]]) -> str:
  """Returns the table of the search, whose text in the README says how long the runs were."""
  cells = []
  for name, changed in rows.SEARCH.items():
    if name in searched:
      mine = outcome(searched[name])
      keys = ", ".join(
        f"`{key}={value}`" for key, value in changed.items() if key not in rows.LONGER
      )
      cells.append(
        [
          f"`{name}`",
          keys,
          mine.count,
          " ".join("–" if value is None else f"{value:.3f}" for value in mine.quality),
          " ".join(f"{value:.3g}" for value in mine.logits),
          " ".join(map(_rise, mine.losses)),
        ]
      )
  return (
    markdown(
      (
        "row",
        "what it sets",
        "stable",
        "quality of each seed",
        "largest router logit of each",
        "largest rise of each, nats",
      ),
      cells,
    )
    if cells
    else NOTHING
  )


def _rise(losses: Sequence[float | None]) -> str:
  """Returns the largest rise of the smoothed loss above its minimum, in the steps that count."""
  if None in losses:
    return "–"
  return f"{stability.height(np.array(losses))[stability.SKIPPED :].max():.2f}"


def _ran(lines: Sequence[Mapping[str, Any]]) -> str:
  """Returns the size of the first row's model, and the runs and minutes of all rows of a table."""
  first = lines[0]
  seconds = sum(line["wall_seconds"] for line in lines)
  seeds = sum(line["seeds"] for line in lines)
  return (
    f"`{first['row']}` has {first['parameters']['total'] / 1e6:.2f}M parameters, "
    f"{first['parameters']['activated'] / 1e6:.2f}M activated; {first['steps']} steps of "
    f"{first['tokens']:,} target tokens in all. {seeds} runs, {seconds / 60:.0f} minutes summed "
    f"over rows. {first['date']}, Python {first['python']}, {common.versions(first)}, "
    f"{first['hardware']}."
  )


def markdown(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
  """Returns a Markdown table whose first two columns are words."""
  return common.markdown(head, cells, common.line(["---"] * 2 + ["---:"] * (len(head) - 2)))
