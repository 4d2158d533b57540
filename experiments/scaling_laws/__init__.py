"""Scaling laws, fitted to trained models; README.md has the question and the outcome."""

from __future__ import annotations

import argparse
import pathlib

from experiments.common import journal
from experiments.common.study import Scale, Study, Verb
from experiments.scaling_laws import fit_command, grid, recovery

HERE = pathlib.Path(__file__).resolve().parent
README = HERE / "README.md"


def fit_grid(scale: str) -> None:
  """Fits the laws to a grid of which all rows are finished, and writes SCALE/fit.json and .png."""
  results = HERE / f"{scale}.jsonl"
  left = set(grid.rows(scale)) - set(journal.load(results))
  if left:
    print(f"{len(left)} rows of the grid are left; the laws are fitted when all have ended")
    return
  fit_command.fit_file(results, out=HERE / scale)


def recover(options: argparse.Namespace) -> int:
  """Renews recovery.json and the tables."""
  recovery.run(HERE / "recovery.json")
  recovery.write(HERE)
  return 0


STUDY = Study(
  name="scaling_laws",
  about="How does the loss fall with parameters, tokens, experts and granularity?",
  scales={
    "desk": Scale("small decoders on CPU cores", HERE / "desk.jsonl", (README,)),
    "paper": Scale("the papers' sizes, for a pod", HERE / "paper.jsonl"),
  },
  rows=grid.rows,
  table=lambda scale: recovery.tables(HERE),
  figures=fit_grid,
  verbs={
    "fit": Verb(
      "Fits the laws to a file of trained models: constants, intervals, predictions.",
      fit_command.flags,
      fit_command.action,
    ),
    "recover": Verb(
      "Fits points that the published laws made, and writes how well their constants are found.",
      lambda parser: None,
      recover,
    ),
  },
)
