"""Runs that are killed again and again: each must end with the bits of one that was never killed.

  python -m experiments.reliability.soak [--runs=100] [--kills=5] [--seed=S] [--processes=2]
    [--write]

Each run is killed by SIGKILL up to `--kills` times, at moments drawn from a printed seed over the
whole time that the run takes: while it starts, compiles, trains, evaluates and saves. Some of the
moments lie right behind the beginning of a save. Then it is left to end. The weights of its last
checkpoint, its metrics and its data position must be those of the unbroken run. --write puts the
table into docs/reliability.md.
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
NEAR_A_SAVE = 0.4  # of the kills
CHANGES = {
  "train__guard__skip_nonfinite": True,
  "train__guard__spike_sigmas": 6.0,
  "train__guard__max_rollbacks": 2,
}


def flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of the verb."""
  parser.add_argument("--runs", type=int, default=100)
  parser.add_argument("--kills", type=int, default=5, help="of a run, at most")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
  parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")


def action(given: argparse.Namespace) -> int:
  """Does what the command line says and returns the exit code."""
  check_counts(given, runs=1, kills=1, processes=1)
  begun = time.monotonic()
  with tempfile.TemporaryDirectory() as folder:
    found = soak(pathlib.Path(folder), given.runs, given.kills, given.seed, given.processes)
  text = table(found, given.seed, time.monotonic() - begun)
  print(text)
  if given.write:
    PAGE.write_text(replace(PAGE.read_text(), "soak", text))
  return int(any(not one["equal"] for one in found))


def soak(
  home: pathlib.Path,
  runs: int,
  kills: int,
  seed: int,
  processes: int,
  warm: bool = True,
  **changes: Any,
) -> list[dict[str, Any]]:
  """Trains the unbroken run and then `runs` that are killed; what became of each.

  Args:
    home: where everything lies.
    runs: how many are killed.
    kills: of a run, at most.
    seed: of the moments.
    processes: runs at a time.
    warm: whether a first run compiles, so that the unbroken run's time is that of the others.
    **changes: of the config's keys; `__` stands for the dot.
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
  """Kills a run some times and lets it end: {"number", "kills", "in a save", "equal", "said"}."""
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
  found = outcome(workdir) if not code else {}
  said = (
    ""
    if found == whole
    else small.said(workdir)
    if code
    else ", ".join(name for name in whole if found.get(name) != whole[name]) + " differ"
  )
  left = [path.name for path in workdir.glob(".*.tmp")] + [
    path.name for path in workdir.glob("checkpoints/*tmp*")
  ]
  if left and not said:
    said = f"left behind: {', '.join(left)}"
  shutil.rmtree(workdir, ignore_errors=True)
  return {"number": number, "kills": killed, "in a save": saving, "equal": not said, "said": said}


def outcome(workdir: pathlib.Path) -> dict[str, Any]:
  """What two runs must agree on, bit for bit."""
  lines = [
    {key: value for key, value in line.items() if key != "tokens_per_second"}
    for line in metrics.read(workdir / "metrics.jsonl")
  ]
  steps = sorted(
    int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()
  )
  data = json.loads((workdir / "checkpoints" / str(steps[-1]) / "data" / "metadata").read_text())
  return {"weights": small.sha256(workdir), "metrics": lines, "checkpoints": steps, "data": data}


def table(found: Sequence[dict[str, Any]], seed: int, seconds: float) -> str:
  """Markdown."""
  kills = Counter(one["kills"] for one in found)
  lines = ["| killed so often | runs | bit-identical to the unbroken run |", "|---:|---:|---:|"]
  lines += [
    f"| {n} | {kills[n]} | {sum(one['equal'] for one in found if one['kills'] == n)} |"
    for n in sorted(kills)
  ]
  lines.append(f"| **all** | {len(found)} | **{sum(one['equal'] for one in found)}** |")
  bad = [f"Run {one['number']}: {one['said']}." for one in found if not one["equal"]]
  total, saving = (sum(one[key] for one in found) for key in ("kills", "in a save"))
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
  """Returns when the run has begun to save so often since now, or has ended, or after `seconds`."""
  seen, end = set(), time.monotonic() + seconds
  before = {path.name for path in workdir.glob("checkpoints/*")}
  while len(seen) < count and process.poll() is None and time.monotonic() < end:
    seen |= {
      path.name.partition(".")[0]
      for path in workdir.glob("checkpoints/*")
      if path.name not in before
    }
    time.sleep(0.002)
