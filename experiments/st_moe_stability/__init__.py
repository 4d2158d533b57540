"""ST-MoE's ablations of stability and design; README.md has the question and the outcome."""

from __future__ import annotations

import pathlib

from experiments.common import journal, plots
from experiments.common.findings import Finding
from experiments.common.study import Job, Scale, Study, lazy_verb
from experiments.st_moe_stability import figures, findings, rows, table
from experiments.st_moe_stability.outcome import CURVES, describe, outcome, stable_values

HERE = table.README.parent
WRITTEN = ("desk", "search")  # the scales whose results are in the README


def make_rows(scale: str):
  """Returns the rows of a scale, or of the search for a base that is fragile."""
  return rows.search() if scale == "search" else rows.rows(rows.SCALES[scale])


def baseline(scale: str, row: str) -> str:
  """Returns the row that an ablation changes, with the same seed if each seed is a row."""
  if scale == "search":
    return ""
  known = rows.ablations(rows.SCALES[scale])
  name, separator, seed = row.rpartition("_seed") if row not in known else (row, "", "")
  return known[name].against and known[name].against + separator + seed


def make_tables(scale: str) -> dict[str, str]:
  """Returns the README's tables that are made from the results of a scale."""
  if scale == "search":
    return {"search": table.tables({}, journal.load(table.SEARCH))["search"]}
  made = table.tables(journal.load(table.RESULTS), {})
  return {name: text for name, text in made.items() if name != "search"}


def published() -> list[Finding]:
  """Returns the paper's findings and our verdicts, for docs/findings.md."""
  lines = journal.load(table.RESULTS)
  return findings.published({name: outcome(line) for name, line in lines.items()})


def draw(scale: str) -> None:
  """Draws the README's figures, which show the rows of the desk."""
  if scale == "desk":
    lines = journal.load(table.RESULTS)
    figures.draw({name: outcome(line) for name, line in lines.items()}, HERE)


def prepare(job: Job) -> None:
  """Raises ConfigError before the runs if the figures could not be drawn after them."""
  if job.tracked and job.scale == "desk":
    plots.pyplot()


def finish(job: Job) -> None:
  """Shortens the results that the repository keeps."""
  if job.scale in WRITTEN:
    thin(job.results)


def thin(results: pathlib.Path) -> None:
  """Drops the curves that the study does not read, which makes the file a quarter as large."""
  if results.exists():
    journal.rewrite(
      results,
      [
        line | {"train": {name: line["train"][name] for name in CURVES}, "load": {}}
        for line in journal.load(results).values()
      ],
    )


STUDY = Study(
  name="st_moe_stability",
  about="Which of ST-MoE's remedies make a sparse model stable, and what do they cost?",
  scales={
    "desk": Scale("small encoder-decoders on CPU cores", table.RESULTS, (table.README,)),
    "gpu": Scale("about 100M activated parameters on one GPU", HERE / "gpu.jsonl"),
    "paper": Scale("the paper's size, each seed a run of its own, for a pod", HERE / "paper.jsonl"),
    "search": Scale("the search for a base that is fragile", table.SEARCH, (table.README,)),
  },
  rows=make_rows,
  table=make_tables,
  figures=draw,
  findings=published,
  verbs={
    "ngrams": lazy_verb(
      "scores tables of counts on the study's targets, beside which its models have to be seen",
      "experiments.st_moe_stability.ngrams",
    )
  },
  baseline=baseline,
  counted=stable_values,
  outcome=describe,
  prepare=prepare,
  finish=finish,
)
