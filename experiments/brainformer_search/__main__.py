"""The search for a Brainformer's block at a desk; README.md beside this file has the question and
the outcome.

python -m experiments.brainformer_search --desk                   searches; the same command goes on
after a kill python -m experiments.brainformer_search --desk --minutes=25      for so long, on as
many cores as --processes (2) python -m experiments.brainformer_search --desk --expert-choice   also
gates that see the future, see README.md python -m experiments.brainformer_search --desk
--results=FILE    another journal than results.jsonl beside this file python -m
experiments.brainformer_search --write                  figures, and the table in README.md
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import json
import multiprocessing
import os
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from experiments.brainformer_search import figures, search, table, trial
from experiments.common import sweep
from moe_jax.errors import ConfigError
from moe_jax.train import guarded
from moe_jax.training import workdir

HERE = pathlib.Path(__file__).resolve().parent
TRIAL_STEPS, FINAL_STEPS = 100, 400  # times to train, in steps of GLaM's block
FINAL_SEEDS = (1, 2, 3)  # trials have seed 0


@dataclasses.dataclass
class Journal:
  """results.jsonl: a head, GLaM's block, the trials, the finals, one line each; all that a resumed
  search knows."""

  path: pathlib.Path

  def __post_init__(self):
    self.lines = sweep.load(self.path)

  def add(self, row: str, line: dict[str, Any]) -> None:
    self.lines[row] = {"row": row} | line
    sweep.append(self.path, self.lines[row])

  def head(self, settings: dict[str, Any], facts: dict[str, Any]) -> None:
    """Writes the first line, or holds it against these settings.

    Raises:
      ConfigError: the search in this file has others.
    """
    if "search" not in self.lines:
      return self.add("search", {"settings": settings} | facts)
    for name, value in settings.items():
      before = self.lines["search"]["settings"].get(name)
      if before != json.loads(json.dumps(value)):
        raise ConfigError(
          name,
          value,
          f"the search in {self.path} has {before!r}; give the same, or another --results",
        )
    return None

  @property
  def trials(self) -> list[dict[str, Any]]:
    """Trials 0, 1, ..., up to the first that is missing."""
    found = []
    while (name := f"trial_{len(found):03}") in self.lines:
      found.append(self.lines[name])
    return found

  @property
  def done(self) -> list[tuple[search.Block, float]]:
    return [(tuple(line["block"]), line["reward"]) for line in self.trials]

  @property
  def spent(self) -> float:
    """CPU seconds of all processes, compiling and evaluating included."""
    return sum(line.get("cpu_seconds", 0.0) for line in self.lines.values())


def run(
  journal: Journal,
  evolution: search.Evolution,
  seconds: float,
  pool: concurrent.futures.Executor,
  bar: tqdm,
  measure=trial.measure,
) -> None:
  """Searches until `seconds` of CPU time are spent but for what the finals will take, and then
  trains these.

  Args:
    journal: with a head.
    evolution: what proposes.
    seconds: of all processes together; those that the journal tells of count.
    pool: where candidates are trained.
    bar: counts these seconds.
    measure: trains one; takes a `trial.Task`.
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
  found = glam if chosen is None else journal.done[chosen][0]
  for seed in FINAL_SEEDS:  # side by side, so that other work on the machine slows both
    train(
      {
        f"final_{name}_{seed}": trial.Task(block, glam, seed, FINAL_STEPS)
        for name, block in (("best", found), ("glam", glam))
      }
    )


def _reserve(journal: Journal) -> float:
  """CPU seconds that the finals will take, by what GLaM's block took."""
  line = journal.lines["glam"]
  idle = line["cpu_seconds"] - line["train_seconds"]
  return 2 * len(FINAL_SEEDS) * (idle + line["train_seconds"] * FINAL_STEPS / TRIAL_STEPS)


def main(argv: Sequence[str]) -> int:
  """Does what the command line says; returns the exit code."""
  parser = argparse.ArgumentParser(prog="python -m experiments.brainformer_search")
  parser.add_argument(
    "--desk", action="store_true", help="search at the size for a desk, the only one here"
  )
  parser.add_argument(
    "--minutes", type=float, default=25.0, help="in all, on --processes cores without other work"
  )
  parser.add_argument("--processes", type=int, default=2, help="candidates at a time (%(default)s)")
  parser.add_argument("--seed", type=int, default=0, help="of what is proposed (%(default)s)")
  parser.add_argument(
    "--expert-choice", action="store_true", help="also gates that see later tokens"
  )
  parser.add_argument(
    "--results", type=pathlib.Path, default=HERE / "results.jsonl", help="the journal"
  )
  parser.add_argument(
    "--write", action="store_true", help="make the figures and the README's table from the journal"
  )
  given = parser.parse_args(argv)
  try:
    journal = Journal(given.results)
    if given.write:
      figures.write(journal, HERE)
      table.write(journal, HERE / "README.md")
    elif given.desk:
      _desk(given, argv, journal)
      print(table.table(journal))
    else:
      raise ConfigError("desk", False, "the search runs at the size for a desk only; give --desk")
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print(
      "stopped; what is finished is kept, and the same command goes on from there", file=sys.stderr
    )
    return 130
  return 0


def _desk(given: argparse.Namespace, argv: Sequence[str], journal: Journal) -> None:
  gates = ("top_2", "expert_choice") if given.expert_choice else ("top_2",)
  evolution = search.Evolution(search.desk_space(gates), given.seed)
  settings = dataclasses.asdict(evolution) | {
    "trial_steps": TRIAL_STEPS,
    "final_steps": FINAL_STEPS,
    "experts": trial.EXPERTS,
    "blocks": trial.BLOCKS,
  }
  versions = workdir.versions()
  facts = {
    "command": "python -m experiments.brainformer_search " + shlex.join(argv),
    "cores": os.cpu_count(),
    "date": datetime.date.today().isoformat(),
    "python": versions["python"],
    "versions": versions["packages"],
    "commit": versions["commit"],
    "data": trial.fingerprints(),
  }
  journal.head(settings, facts)
  seconds = 60 * given.minutes * given.processes
  trial.one_thread()
  context = multiprocessing.get_context("spawn")
  with (
    concurrent.futures.ProcessPoolExecutor(
      given.processes, context, trial.prepare, (os.getpid(),)
    ) as pool,
    tqdm(total=round(seconds), initial=round(journal.spent), unit="s", bar_format=BAR) as bar,
  ):
    run(journal, evolution, seconds, pool, bar)


BAR = "{percentage:3.0f}%|{bar}| {n:.0f} of {total:.0f} CPU seconds, {elapsed} elapsed{postfix}"


if __name__ == "__main__":
  sys.exit(guarded(sys.argv, None, lambda argv: main(argv[1:])))
