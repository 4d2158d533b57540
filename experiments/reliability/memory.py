"""The resident memory of a small run must not grow over 20,000 steps.

  python -m experiments reliability memory [--steps=20000] [--write]

The resident memory of the process is read once a second, with the step that metrics.jsonl has
reached. What the end of a run takes (the final evaluation, the ladder, the report) is reported
apart. --write puts the numbers and the figure into docs/. The exit code is 1 if the memory after
the last steps is more than 5% above the memory after a tenth of them.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import tempfile
import time

import numpy as np
from tqdm import tqdm

from experiments.common.command_line import check_counts
from experiments.common.tables import replace
from experiments.reliability import small
from moe_jax.report.charts import Line, line_file

PAGE = small.ROOT / "docs" / "reliability.md"
FIGURE = small.ROOT / "docs" / "memory.svg"
GROWTH = 0.05
CHANGES = {
  "train__log_every": 20,
  "train__eval_every": 1000,
  "train__checkpoint_every": 1000,
  "optimizer__schedule": "constant",
}


def flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of the verb."""
  parser.add_argument("--steps", type=int, default=20_000)
  parser.add_argument("--write", action="store_true", help="put numbers and figure into docs/")


def action(options: argparse.Namespace) -> int:
  """Does what the command line says and returns the exit code."""
  check_counts(options, steps=2000)  # a shorter run ends before there are enough readings
  begun = time.monotonic()
  with tempfile.TemporaryDirectory() as folder:
    steps, megabytes = measure(pathlib.Path(folder), options.steps)
  training = steps < options.steps
  finish = megabytes[~training].max(initial=0.0)
  steps, megabytes = steps[training], megabytes[training]
  early, late = (at(steps, megabytes, step) for step in (options.steps // 10, options.steps))
  minutes = (time.monotonic() - begun) / 60
  text = (
    f"Resident memory after {options.steps // 10:,} steps: {early:.0f} MB, "
    f"after {options.steps:,}: {late:.0f} MB ({late / early - 1:+.1%}); "
    f"at most {finish:.0f} MB during the final evaluation and the report; "
    f"{len(steps):,} readings, {minutes:.0f} minutes."
  )
  print(text)
  if options.write:
    FIGURE.write_text(
      line_file(
        f"Resident memory over {options.steps:,} steps",
        [Line("resident memory", steps, megabytes, "#0072b2")],
        y_label="MB",
      )
    )
    PAGE.write_text(
      replace(PAGE.read_text(), "memory", f"{text}\n\n![Resident memory by step]({FIGURE.name})")
    )
  return int(late > early * (1 + GROWTH))


def measure(home: pathlib.Path, total: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the steps and megabytes of the readings, from the first log line to the run's end."""
  small.write_corpus(home / "corpus")
  process = small.start(home, home / "run", train__steps=total, **CHANGES)
  steps, megabytes = [], []
  with tqdm(total=total, unit="step") as bar:
    while process.poll() is None:
      time.sleep(1.0)
      step, resident = _last_step(home / "run" / "metrics.jsonl"), _resident(process.pid)
      if step and resident:
        steps.append(step)
        megabytes.append(resident)
        bar.update(step - bar.n)
  if process.wait():
    raise RuntimeError(f"the run does not end: {small.said(home / 'run')}")
  return np.array(steps, float), np.array(megabytes)


def at(steps: np.ndarray, megabytes: np.ndarray, step: int) -> float:
  """Returns the median of the ten readings nearest to a step."""
  return float(np.median(megabytes[np.argsort(np.abs(steps - step))[:10]]))


def _resident(pid: int) -> float:
  """Returns the resident memory of a process in MB, or 0 if it has ended."""
  try:
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
  except OSError:
    return 0.0
  return next((int(line.split()[1]) / 1000 for line in lines if line.startswith("VmRSS")), 0.0)


def _last_step(file: pathlib.Path) -> int:
  """Returns the step of the last whole training line; only the end of the file is read."""
  try:
    with file.open("rb") as lines:
      lines.seek(max(file.stat().st_size - 20_000, 0))
      # The first and the last part may not be whole lines.
      last_lines = lines.read().split(b"\n")[1:-1]
  except OSError:
    return 0
  return next((json.loads(line)["step"] for line in reversed(last_lines) if b'"train"' in line), 0)
