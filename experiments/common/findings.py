"""The published findings that studies re-test, and docs/findings.md, which lists them all."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence

from experiments.common import tables

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "findings.md"
HOLDS, PARTLY, FAILS, OPEN = "holds", "holds in part", "does not hold", "not decided"


@dataclasses.dataclass(frozen=True)
class Finding:
  """A statement of a paper, and what a study found.

  Attributes:
    paper: The paper with its year, and the table or section.
    words: The statement.
    theirs: The paper's numbers, or "–" if it gives none.
    ours: Our numbers with their spread.
    verdict: One of `HOLDS`, `PARTLY`, `FAILS` and `OPEN`.
    why: Why it is not decided, or what the verdict is limited by; "" if nothing.
  """

  paper: str
  words: str
  theirs: str
  ours: str
  verdict: str
  why: str = ""


def table(found: Mapping[str, Sequence[Finding]]) -> str:
  """Returns the page's table, and the numbers of verdicts.

  Args:
    found: The name of a study -> its findings.
  """
  head = ("the paper's finding", "paper", "its numbers", "here", "verdict", "command")
  rows = [
    [
      finding.words,
      finding.paper,
      finding.theirs,
      finding.ours,
      f"**{finding.verdict}**" + (f": {finding.why}" if finding.why else ""),
      f"[`{study} run`](../experiments/{study}/README.md)",
    ]
    for study, findings in found.items()
    for finding in findings
  ]
  every = [finding.verdict for findings in found.values() for finding in findings]
  counts = [
    f"{every.count(verdict)} {'is' if every.count(verdict) == 1 else 'are'} of the kind '{verdict}'"
    for verdict in (HOLDS, PARTLY, FAILS, OPEN)
  ]
  made = tables.markdown(head, rows, tables.line(["---"] * len(head)))
  return f"{made}\n\nOf {len(every)} findings, {', '.join(counts[:-1])}, and {counts[-1]}."


def renew(found: Iterable[tuple[str, Sequence[Finding]]]) -> None:
  """Writes the table into docs/findings.md."""
  tables.write(PAGE, {"findings": table({name: each for name, each in found if each})})
