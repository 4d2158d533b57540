"""Dry runs of the papers' models at the papers' scale; docs/paper_scale.md has the answers."""

from __future__ import annotations

import pathlib

from experiments.common import journal
from experiments.common.study import Scale, Study
from experiments.paper_scale import dry_runs, page
from experiments.paper_scale import rows as study_rows
from moe_jax.dryrun.page import text

RESULTS = pathlib.Path(__file__).resolve().parent / "results.jsonl"


def make_tables(scale: str) -> dict[str, str]:
  """Returns the tables of docs/paper_scale.md, which are the same at both scales."""
  done = journal.load(RESULTS)
  return page.make_tables({name: done[name] for name in study_rows.ROWS if name in done})


def describe(line: journal.Line, words: str) -> str:
  """Returns whether a row fits its machine, and what would bind, in place of `words`."""
  if "error" in line:
    return line["error"]
  memory, roofline = line["memory"], line["roofline"]
  return (
    f"fits, {memory['peak'] / memory['available']:.0%} of the memory of a device; "
    f"{roofline['binds']} binds; {text.number(roofline['days'])} days for all steps"
  )


STUDY = Study(
  name="paper_scale",
  about="Do the papers' models fit machines of the papers' size, and what would bind?",
  scales={
    "fast": Scale("compiled with --fast, a minute a row", RESULTS, (page.FILE,)),
    "full": Scale("with the compilers' full optimisation, minutes a row", RESULTS, (page.FILE,)),
  },
  rows=study_rows.rows,
  table=make_tables,
  outcome=describe,
  train=dry_runs.train,
)
