"""Runs the search: proposes blocks, trains them, and trains the best one for longer."""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import multiprocessing
import os
import shlex
import sys
from typing import Any

from tqdm import tqdm

from experiments.brainformer_search import search, trial
from experiments.brainformer_search.journal import Journal
from moe_jax.training import workdir

TRIAL_STEPS, FINAL_STEPS = 100, 400  # the times to train, in steps of GLaM's block
FINAL_SEEDS = (1, 2, 3)  # trials have seed 0
BAR = "{percentage:3.0f}%|{bar}| {n:.0f} of {total:.0f} CPU seconds, {elapsed} elapsed{postfix}"


def run(
  journal: Journal,
  evolution: search.Evolution,
  seconds: float,
  pool: concurrent.futures.Executor,
  bar: tqdm,
  measure=trial.measure,
) -> None:
  """Searches until only the time for the finals is left of the budget, and trains the finals.

  Args:
    journal: The journal, which already has its settings.
    evolution: Proposes the candidates.
    seconds: The budget of CPU seconds of all processes together, including those in the journal.
    pool: Trains the candidates.
    bar: Counts the seconds.
    measure: Trains a `trial.Task` and returns its line.
  """
  glam = search.glam_block(evolution.space)

  def train(tasks: dict[str, trial.Task], add=lambda row, line: line) -> None:
    futures = {
      pool.submit(measure, task): row for row, task in tasks.items() if row not in journal.lines
    }
    for future in concurrent.futures.as_completed(futures):
      line = future.result()
      journal.add(futures[future], add(futures[future], line))
      bar.update(line["cpu_seconds"])

  train({"glam": trial.Task(glam, glam, 0, TRIAL_STEPS)})
  base = journal.lines["glam"]

  def rewarded(row: str, line: dict[str, Any]) -> dict[str, Any]:
    bits = line["bits_per_byte"]
    value = search.reward(
      float("nan") if bits is None else bits,
      line["relative_step"],
      line["quarter"],
      base["bits_per_byte"],
      base["quarter"],
    )
    return {"parent": parents[row], "reward": value} | line

  while journal.spent + _reserve(journal) < seconds and not any(
    row.startswith("final") for row in journal.lines
  ):
    first = len(journal.trials) // evolution.round * evolution.round
    proposed = {
      f"trial_{n:03}": evolution.propose(n, journal.done)
      for n in range(first, first + evolution.round)
    }
    parents = {row: parent for row, (_, parent) in proposed.items()}
    train(
      {
        row: trial.Task(block, glam, 0, TRIAL_STEPS, base["quarter"])
        for row, (block, _) in proposed.items()
      },
      rewarded,
    )
    bar.set_postfix(
      trials=len(journal.trials), best=f"{max(reward for _, reward in journal.done):+.3f}"
    )
  chosen = search.best(journal.done, [line["relative_step"] for line in journal.trials])
  best = glam if chosen is None else journal.done[chosen][0]
  # Both blocks are trained side by side, so that other work on the machine slows both.
  for seed in FINAL_SEEDS:
    train(
      {
        f"final_{name}_{seed}": trial.Task(block, glam, seed, FINAL_STEPS)
        for name, block in (("best", best), ("glam", glam))
      }
    )


def _reserve(journal: Journal) -> float:
  """Estimates the CPU seconds of the finals from those of GLaM's block."""
  line = journal.lines["glam"]
  idle = line["cpu_seconds"] - line["train_seconds"]
  return 2 * len(FINAL_SEEDS) * (idle + line["train_seconds"] * FINAL_STEPS / TRIAL_STEPS)


def search_at_a_desk(options: argparse.Namespace, journal: Journal) -> None:
  """Searches, or goes on with the search of a journal, and trains the finals.

  Args:
    options: The flags `minutes`, `processes`, `seed` and `expert_choice` of the command line.
    journal: The journal, which may be empty.

  Raises:
    ConfigError: The journal is that of a search with other settings.
  """
  gates = ("top_2", "expert_choice") if options.expert_choice else ("top_2",)
  evolution = search.Evolution(search.desk_space(gates), options.seed)
  settings = dataclasses.asdict(evolution) | {
    "trial_steps": TRIAL_STEPS,
    "final_steps": FINAL_STEPS,
    "experts": trial.EXPERTS,
    "blocks": trial.BLOCKS,
  }
  versions = workdir.versions()
  facts = {
    "command": "python -m experiments " + shlex.join(sys.argv[1:]),
    "cores": os.cpu_count(),
    "date": datetime.date.today().isoformat(),
    "python": versions["python"],
    "versions": versions["packages"],
    "commit": versions["commit"],
    "data": trial.fingerprints(),
  }
  journal.head(settings, facts)
  seconds = 60 * options.minutes * options.processes
  trial.one_thread()
  context = multiprocessing.get_context("spawn")
  with (
    concurrent.futures.ProcessPoolExecutor(
      options.processes, context, trial.prepare, (os.getpid(),)
    ) as pool,
    tqdm(total=round(seconds), initial=round(journal.spent), unit="s", bar_format=BAR) as bar,
  ):
    run(journal, evolution, seconds, pool, bar)
