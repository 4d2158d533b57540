"""Whole schedules of lifelong pretraining; README.md has the question, the rule and the outcome."""

from __future__ import annotations

import pathlib
from typing import Any

from experiments.common import journal, sweep
from experiments.common.study import Job, Scale, Study
from experiments.common.study import train as train_rows
from experiments.lifelong import table
from experiments.lifelong.schedule import BASE, METHODS, Schedule

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "results.jsonl"
ROWS = {name: Schedule(name) for name in METHODS if name != BASE}


def train(job: Job) -> None:
  """Trains the models of the first distribution, with which rows begin, and then the rows."""
  todo: list[Schedule] = [job.rows[name] for name in sweep.unfinished(job.rows, job.results)]
  if any(METHODS[row.method].sequence for row in todo):
    # A schedule has the methods of the runner's rows.
    base: Any = Schedule(BASE, todo[0].steps, todo[0].seeds, todo[0].overrides)
    sweep.run({BASE: base}, job.workdir / "base.jsonl", job.workdir, devices=job.devices)
  train_rows(job)


STUDY = Study(
  name="lifelong",
  about="Does Lifelong-MoE learn new text and forget less than other ways of training on?",
  scales={
    "desk": Scale("about 1.5M tokens a schedule on CPU cores", RESULTS, (HERE / "README.md",))
  },
  rows=lambda scale: ROWS,
  table=lambda scale: {"lifelong": table.table(journal.load(RESULTS))},
  baseline=lambda scale, row: table.PLAIN if row != table.PLAIN else "",
  paired=True,
  outcome=table.outcome,
  train=train,
  findings=lambda: table.findings(journal.load(RESULTS)),
)
