"""Runs that are killed again and again must end with the bits of one that was never killed.

  python -m experiments reliability soak [--runs=100] [--kills=5] [--seed=S] [--processes=2]

Each run is killed by SIGKILL up to `--kills` times. The moments are drawn from a seed over the
whole time that a run takes: while it starts, compiles, trains, evaluates and saves. Some of them
lie right after the beginning of a save. Then the run is left to end. The weights of its last
checkpoint, its metrics and its place in the data must be those of the unbroken run. --write puts
the table into docs/reliability.md. The exit code is 1 if a run differs.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import pathlib
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from experiments.common.command_line import check_counts
from experiments.common.tables import replace
from experiments.reliability import small
from moe_jax.training import metrics

PAGE = small.ROOT / "docs" / "reliability.md"
NEAR_A_SAVE = 0.4  # the share of kills right after the beginning of a save
CHANGES = {
  "train__guard__skip_nonfinite": True,
  "train__guard__spike_sigmas": 6.0,
  "train__guard__max_rollbacks": 2,
}


def flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of the verb."""
  parser.add_argument("--runs", type=int, default=100)
  parser.add_argument("--kills", type=int, default=5, help="the most kills of a run")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
  parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")


def action(options: argparse.Namespace) -> int:
  """Does what the command line says and returns the exit code."""
  check_counts(options, runs=1, kills=1, processes=1)
  begun = time.monotonic()
  with tempfile.TemporaryDirectory() as folder:
    outcomes = soak(
      pathlib.Path(folder), options.runs, options.kills, options.seed, options.processes
    )
  text = table(outcomes, options.seed, time.monotonic() - begun)
  print(text)
  if options.write:
    PAGE.write_text(replace(PAGE.read_text(), "soak", text))
  return int(any(not one["equal"] for one in outcomes))


def soak(
  home: pathlib.Path,
  runs: int,
  kills: int,
  seed: int,
  processes: int,
  warm: bool = True,
  **changes: Any,
) -> list[dict[str, Any]]:
  """Trains the unbroken run and then runs that are killed, and returns what became of each.

  Args:
    home: The folder that holds everything.
    runs: The number of runs that are killed.
    kills: The most kills of a run.
    seed: Seeds the moments.
    processes: The number of runs at a time.
    warm: Whether a run compiles the programs first, so that the time of the unbroken run is that of
      the others.
    **changes: Config keys to change, in which `__` stands for the dot.
  """
  small.write_corpus(home / "corpus")
  changes = CHANGES | changes
  for name in ("warm", "whole") if warm else ("whole",):
    began = time.monotonic()
    if small.start(home, home / name, **changes).wait():
      raise RuntimeError(f"the unbroken run does not end: {small.said(home / name)}")
    seconds = time.monotonic() - began
  whole = outcome(home / "whole")
  with concurrent.futures.ThreadPoolExecutor(processes) as pool:
    jobs = [
      pool.submit(
        one_run,
        home,
        number,
        kills,
        random.Random(f"{seed} {number}"),
        seconds * processes,
        whole,
        changes,
      )
      for number in range(runs)
    ]
    return [
      job.result() for job in tqdm(concurrent.futures.as_completed(jobs), total=runs, unit="run")
    ]


def one_run(
  home: pathlib.Path,
  number: int,
  kills: int,
  draw: random.Random,
  seconds: float,
  whole: dict[str, Any],
  changes: dict[str, Any],
) -> dict[str, Any]:
  """Kills a run some times, lets it end, and compares it with the unbroken run.

  Args:
    home: The folder that holds everything.
    number: The number of the run.
    kills: The most kills.
    draw: Draws the moments.
    seconds: The time that a run takes.
    whole: The outcome of the unbroken run.
    changes: Config keys to change, in which `__` stands for the dot.

  Returns:
    {"number", "kills", "in a save", "equal", "said"}.
  """
  workdir, killed, saving = home / f"run{number}", 0, 0
  for _ in range(draw.randint(1, kills)):
    process = small.start(home, workdir, **changes)
    if draw.random() < NEAR_A_SAVE:
      _wait_for_a_save(process, workdir, draw.randint(1, 3), seconds)
      time.sleep(draw.random() * 0.05)
    else:
      time.sleep(draw.random() * seconds)
    if process.poll() is None:
      saving += any(workdir.glob("checkpoints/*tmp*"))
      process.kill()
      killed += 1
    process.wait()
  code = small.start(home, workdir, **changes).wait()
  mine = outcome(workdir) if not code else {}
  problem = (
    ""
    if mine == whole
    else small.said(workdir)
    if code
    else ", ".join(name for name in whole if mine.get(name) != whole[name]) + " differ"
  )
  left = [path.name for path in workdir.glob(".*.tmp")] + [
    path.name for path in workdir.glob("checkpoints/*tmp*")
  ]
  if left and not problem:
    problem = f"left behind: {', '.join(left)}"
  shutil.rmtree(workdir, ignore_errors=True)
  return {
    "number": number,
    "kills": killed,
    "in a save": saving,
    "equal": not problem,
    "said": problem,
  }


def outcome(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns what two runs must agree on, bit for bit."""
  lines = [
    {key: value for key, value in line.items() if key != "tokens_per_second"}
    for line in metrics.read(workdir / "metrics.jsonl")
  ]
  steps = sorted(
    int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()
  )
  data = json.loads((workdir / "checkpoints" / str(steps[-1]) / "data" / "metadata").read_text())
  return {"weights": small.sha256(workdir), "metrics": lines, "checkpoints": steps, "data": data}


def table(outcomes: Sequence[dict[str, Any]], seed: int, seconds: float) -> str:
  """Returns a Markdown table with a row for each number of kills."""
  kills = Counter(one["kills"] for one in outcomes)
  lines = ["| killed so often | runs | bit-identical to the unbroken run |", "|---:|---:|---:|"]
  lines += [
    f"| {n} | {kills[n]} | {sum(one['equal'] for one in outcomes if one['kills'] == n)} |"
    for n in sorted(kills)
  ]
  lines.append(f"| **all** | {len(outcomes)} | **{sum(one['equal'] for one in outcomes)}** |")
  bad = [f"Run {one['number']}: {one['said']}." for one in outcomes if not one["equal"]]
  total, saving = (sum(one[key] for one in outcomes) for key in ("kills", "in a save"))
  return "\n".join(
    [
      *lines,
      "",
      *bad,
      f"{total} kills, {saving} of them while a checkpoint was written; seed {seed}; "
      f"{seconds / 60:.0f} minutes on {os.cpu_count()} cores.",
    ]
  )


def _wait_for_a_save(process, workdir: pathlib.Path, count: int, seconds: float) -> None:
  """Waits until the run has begun `count` saves, has ended, or `seconds` have passed."""
  saves, end = set(), time.monotonic() + seconds
  before = {path.name for path in workdir.glob("checkpoints/*")}
  while len(saves) < count and process.poll() is None and time.monotonic() < end:
    saves |= {
      path.name.partition(".")[0]
      for path in workdir.glob("checkpoints/*")
      if path.name not in before
    }
    time.sleep(0.002)
