"""The shape that all studies and tools of experiments/ share."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.common import journal
from experiments.common.findings import Finding


@dataclasses.dataclass(frozen=True)
class Scale:
  """A size at which a study can be run.

  Attributes:
    about: One line for the help.
    results: The tracked file that keeps the results of the finished rows.
    readmes: The Markdown files that hold the study's tables at this scale. () means that the scale
      has no tables.
  """

  about: str
  results: pathlib.Path
  readmes: tuple[pathlib.Path, ...] = ()


@dataclasses.dataclass(frozen=True)
class Job:
  """What one `run` command asks a study to train.

  Attributes:
    scale: A key of the study's scales.
    rows: Name -> row, of the rows that were chosen. A row with a router of one's own file has the
      name ROW+ROUTER, see `plain_name`.
    results: The file that gets a line for each row that ends.
    workdir: The folder that holds the folders and the logs of the runs.
    processes: The number of rows that are trained at a time.
    devices: Values of CUDA_VISIBLE_DEVICES, as in `sweep.run`.
    report: Is called with the name and the line of each row that ends.
    tracked: Whether `results` is the tracked file of the scale. Rows that --set or --seeds changed
      have a file in the workdir instead.
  """

  scale: str
  rows: Mapping[str, Any]
  results: pathlib.Path
  workdir: pathlib.Path
  processes: int = 1
  devices: Sequence[str] = ()
  report: journal.Report = lambda name, line: None
  tracked: bool = True


def plain_name(row: str) -> str:
  """Returns the name of the study's own row of which `row` is a copy with another router."""
  return row.partition("+")[0]


def train(job: Job) -> None:
  """Trains the unfinished rows of a job, each in a process of its own."""
  # Imported here, so that a process which only needs the tools' packages does not import JAX.
  from experiments.common import sweep

  sweep.run(
    job.rows, job.results, job.workdir, job.processes, devices=job.devices, report=job.report
  )


@dataclasses.dataclass(frozen=True)
class Verb:
  """A command of one study beside `run`, `write` and `print`, or in place of one of them.

  Attributes:
    about: One line for the help.
    flags: Adds the verb's flags to a parser.
    action: Takes the flags that were given, and returns the exit code.
  """

  about: str
  flags: Callable[[argparse.ArgumentParser], None]
  action: Callable[[argparse.Namespace], int]


def lazy_verb(about: str, module: str) -> Verb:
  """Returns a verb whose module is imported when the verb is used.

  Args:
    about: One line for the help.
    module: The full name of a module with the functions `flags` and `action`, see `Verb`.
  """
  return Verb(
    about,
    lambda parser: importlib.import_module(module).flags(parser),
    lambda options: importlib.import_module(module).action(options),
  )


def _no_baseline(scale: str, row: str) -> str:
  return ""


def _as_described(line: journal.Line, words: str) -> str:
  return words


def _values(line: journal.Line) -> Sequence[float | None]:
  # Imported here, so that a process which only needs the tools' packages does not import JAX.
  from experiments.common import outcomes

  return outcomes.values(line)


@dataclasses.dataclass(frozen=True)
class Study:
  """A study: its rows, and how their results become tables and figures.

  A study without `rows` has only the verbs that it brings itself, and `write` if it has a table or
  figures. A tool, such as a benchmark, is a study with nothing but verbs.

  Attributes:
    name: The name on the command line, which is also that of the module below experiments/.
    about: One line for the list of studies.
    scales: Name -> scale; the first is the one that `run` takes by default.
    rows: Returns the rows of a scale, name -> row. A row has the methods of `sweep.Row`, and no "+"
      in its name.
    table: Returns the tables of a scale as marker -> Markdown, made from the files of results.
    figures: Writes the figures of a scale, and other files that are made from its results. It is
      called when there are results, and before `table`.
    baseline: Returns the name of the row that a row of a scale is compared with, or "".
    counted: Returns the measure of each seed of a line, and None for seeds that do not count.
    paired: Whether seed i of two rows is compared with seed i, see `outcomes.describe`.
    outcome: Returns what a line of results came to. It takes the line, and what
      `outcomes.describe` says of it with the two fields above.
    prepare: Is called before any row is trained, to say early what is missing.
    train: Trains the rows of a job.
    finish: Is called after the rows of a job on the tracked file were trained, and before tables
      are written.
    load: Reads a tracked file of results as row -> line.
    findings: Returns the published findings that the study re-tests, made from its results; they
      are rows of docs/findings.md.
    verbs: Name -> further verb.
  """

  name: str
  about: str
  scales: Mapping[str, Scale] = dataclasses.field(default_factory=dict)
  rows: Callable[[str], Mapping[str, Any]] | None = None
  table: Callable[[str], Mapping[str, str]] | None = None
  figures: Callable[[str], None] | None = None
  baseline: Callable[[str, str], str] = _no_baseline
  counted: Callable[[journal.Line], Sequence[float | None]] = _values
  paired: bool = False
  outcome: Callable[[journal.Line, str], str] = _as_described
  prepare: Callable[[Job], None] | None = None
  train: Callable[[Job], None] = train
  finish: Callable[[Job], None] | None = None
  load: Callable[[pathlib.Path], dict[str, dict[str, Any]]] = journal.load
  findings: Callable[[], Sequence[Finding]] | None = None
  verbs: Mapping[str, Verb] = dataclasses.field(default_factory=dict)
