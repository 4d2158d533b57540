"""Table 6 of Shazeer et al. 2017 at a desk; README.md has the question and the outcome."""

from __future__ import annotations

import datetime
import os
import pathlib

from absl import logging
from tqdm import tqdm

from experiments.common import journal
from experiments.common.study import Job, Scale, Study
from experiments.lstm_moe import study, table
from moe_jax.errors import ConfigError


def baseline(scale: str, row: str) -> str:
  """Returns the row without balance losses of the same seed."""
  if scale != "desk":
    return ""
  name = study.name(0.0, 0.0, int(row.rpartition("seed")[2]))
  return "" if name == row else name


def prepare(job: Job) -> None:
  """Lets the runs share compiled programs, because seeds and weights of losses differ in none."""
  folder = job.workdir.absolute() / "compiled"
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))


def finish(job: Job) -> None:
  """Measures the balance of each finished run that has no line in balance.jsonl yet.

  Raises:
    ConfigError: The folder of such a run is gone.
  """
  if job.scale != "desk":
    return
  logging.set_verbosity(logging.ERROR)  # Orbax warns of things that are as they should be
  measured, results = journal.load(table.BALANCE), journal.load(table.RESULTS)
  names = [name for name in job.rows if name in results and name not in measured]
  for name in tqdm(names, unit="run"):
    directory = job.workdir / name
    if not (directory / "checkpoints").is_dir():
      raise ConfigError(
        "workdir",
        str(directory),
        "is gone, and the balance of its router cannot be measured; remove the line of "
        f"{name} from {table.RESULTS} to train it again",
      )
    line = {"row": name, "date": datetime.date.today().isoformat()}
    journal.append(table.BALANCE, line | study.balance(study.DESK[name], directory))


HERE = pathlib.Path(__file__).resolve().parent
STUDY = Study(
  name="lstm_moe",
  about="Do the balance losses of 2017 balance? Table 6 of Shazeer et al. at a desk.",
  scales={
    "desk": Scale("32 experts, 0.8M tokens, on CPU cores", table.RESULTS, (table.README,)),
    "paper": Scale("MoE-256 on one billion words", HERE / "paper.jsonl"),
  },
  rows=lambda scale: study.DESK if scale == "desk" else study.FULL,
  table=lambda scale: {"lstm_moe": table.table(table.runs())},
  figures=lambda scale: table.draw() if scale == "desk" else None,
  baseline=baseline,
  prepare=prepare,
  finish=finish,
  findings=table.findings,
)
