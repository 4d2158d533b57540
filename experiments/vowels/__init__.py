"""Adaptive mixtures on Peterson and Barney's vowels; README.md has the question and the outcome."""

from __future__ import annotations

import argparse
import json
from typing import Any

from tqdm import tqdm

from experiments.common import tables
from experiments.common.study import Scale, Study, Verb
from experiments.vowels import runs, table
from moe_jax.training import progress

RESULTS = runs.HERE / "results.json"


def make_tables(scale: str) -> dict[str, str]:
  """Returns the README's tables by marker."""
  return {"vowels": table.table(json.loads(RESULTS.read_text()))}


def run(options: argparse.Namespace) -> int:
  """Trains all models, and renews results, figures and tables."""
  with progress.working("training all models and drawing figures", tqdm.write):
    runs.train()
  made = make_tables("desk")
  tables.write(table.README, made)
  print(made["vowels"])
  return 0


def no_flags(parser: argparse.ArgumentParser) -> Any:
  """Adds no flags: all runs of the study are one program of a few minutes."""


STUDY = Study(
  name="vowels",
  about="Do mixtures of experts learn vowels in half the epochs? Table 1 of Jacobs et al. 1991.",
  scales={"desk": Scale("a few minutes on two CPU cores", RESULTS, (table.README,))},
  table=make_tables,
  findings=lambda: table.findings(json.loads(RESULTS.read_text())),
  verbs={"run": Verb("Trains all models, then writes tables and figures.", no_flags, run)},
)
