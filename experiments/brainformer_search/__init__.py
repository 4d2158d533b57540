"""The search for a Brainformer's block at a desk; README.md has the question and the outcome."""

from __future__ import annotations

import argparse
import pathlib

from tqdm import tqdm

from experiments.brainformer_search import figures, runner, table
from experiments.brainformer_search.journal import Journal
from experiments.common import plots, tables
from experiments.common.command_line import check_counts
from experiments.common.study import Scale, Study, Verb
from moe_jax.training import progress

HERE = pathlib.Path(__file__).resolve().parent
README, RESULTS = HERE / "README.md", HERE / "results.jsonl"


def flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of the search."""
  parser.add_argument(
    "--minutes",
    type=float,
    default=25.0,
    help="in all, on --processes cores without other work (%(default)s)",
  )
  parser.add_argument("--processes", type=int, default=2, help="candidates at a time (%(default)s)")
  parser.add_argument("--seed", type=int, default=0, help="seeds the proposals (%(default)s)")
  parser.add_argument(
    "--expert-choice",
    action="store_true",
    help="also proposes gates that see later tokens, which the README explains",
  )
  parser.add_argument(
    "--results",
    type=pathlib.Path,
    default=RESULTS,
    help="the journal of the search; a search with other settings needs another one",
  )


def run(options: argparse.Namespace) -> int:
  """Searches, and writes tables and figures if the journal is that of the repository."""
  check_counts(options, minutes=0, processes=1)
  tracked = options.results.resolve() == RESULTS
  if tracked:
    plots.pyplot()  # a missing library is told now, not after the search
  journal = Journal(options.results)
  # The bar shows what the search has found, and a candidate may take longer than a user waits.
  with progress.working("searching", tqdm.write):
    runner.search_at_a_desk(options, journal)
  print(table.table(journal))
  if tracked:
    figures.write(journal, HERE)
    tables.write(README, make_tables("desk"))
  return 0


def make_tables(scale: str) -> dict[str, str]:
  """Returns the README's table by marker."""
  return {"brainformer_search": table.table(Journal(RESULTS))}


STUDY = Study(
  name="brainformer_search",
  about="Does evolution find a better block than GLaM's at a desk?",
  scales={"desk": Scale("25 minutes on two CPU cores", RESULTS, (README,))},
  table=make_tables,
  findings=lambda: table.findings(Journal(RESULTS)),
  figures=lambda scale: figures.write(Journal(RESULTS), HERE),
  verbs={"run": Verb("Searches, then writes the table and the figures.", flags, run)},
)
