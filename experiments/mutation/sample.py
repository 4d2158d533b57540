"""Draws small changes of the package and reports which of them the tests notice.

  python -m experiments mutation run [--count=N] [--seed=S] [--only=PART] [--judges=PART]
    [--seconds=60] [--processes=2] [--write]

The tool lists all small changes (`operators.py`) of routing/, dispatch/, training/step.py and
training/checkpoints.py. It draws `--count` of them, from each file in proportion to its share, and
puts each into a copy of the repository. There it runs the tests that execute the changed line until
one fails: first those of the module's own file, and then the fastest of the others, as many as take
`--seconds` together. A line that no test executes, such as a default, is judged by all tests of its
module. --only takes the mutants whose text contains PART, and --judges the files of tests whose
path contains it. --write puts the table into docs/reliability.md.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import random
import time
from collections.abc import Mapping, Sequence

from experiments.common.command_line import check_counts, check_folder
from experiments.common.tables import replace
from experiments.mutation.judge import ROOT, run
from experiments.mutation.operators import Mutant, mutants
from moe_jax.errors import ConfigError

PAGE = ROOT / "docs" / "reliability.md"
PARTS = {
  "routing/": "moe_jax/routing/*.py",
  "dispatch/": "moe_jax/dispatch/*.py",
  "training/step.py": "moe_jax/training/step.py",
  "training/checkpoints.py": "moe_jax/training/checkpoints.py",
}
# The tests that may judge. Those that start whole programs would take too long.
JUDGES = (
  "tests/routing/*_test.py",
  "tests/dispatch/*_test.py",
  "tests/layers/*_test.py",
  "tests/training/*_test.py",
  "tests/sharding/parallel_test.py",
  "tests/models/stack_test.py",
  "tests/report/routing_page_test.py",
  "tests/routers_test.py",
  "tests/assembly/bind_test.py",
  "tests/assembly/validate_test.py",
)


def flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of the verb."""
  parser.add_argument("--count", type=int, default=200, help="mutants to draw (%(default)s)")
  parser.add_argument("--seed", type=int, default=0, help="seeds the draw (%(default)s)")
  parser.add_argument("--only", default="", help="a part of the mutants' texts")
  parser.add_argument("--judges", default="", help="a part of the paths of the tests")
  parser.add_argument(
    "--seconds",
    type=float,
    default=60.0,
    help="seconds of other files' tests for a mutant (%(default)s)",
  )
  parser.add_argument(
    "--processes", type=int, default=os.cpu_count() or 1, help="mutants at a time (%(default)s)"
  )
  parser.add_argument(
    "--out", type=pathlib.Path, help="a file that gets a line of JSON for each mutant"
  )
  parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")


def action(options: argparse.Namespace) -> int:
  """Does what the command line says and returns the exit code."""
  check_counts(options, count=1, processes=1, seconds=0)
  check_folder("out", options.out)
  if options.write and (options.only or options.judges):
    raise ConfigError(
      "write", True, "would put a part of the run into the table; leave out --only and --judges"
    )
  everything = {
    part: [
      mutant
      for path in sorted(ROOT.glob(pattern))
      for mutant in mutants(ROOT, str(path.relative_to(ROOT)))
    ]
    for part, pattern in PARTS.items()
  }
  possible = [
    mutant for part in everything.values() for mutant in part if options.only in str(mutant)
  ]
  if not possible:
    raise ConfigError(
      "only",
      options.only,
      "is in the text of no mutant; use a part of a path, such as routing/top_k.py",
    )
  chosen = drawn(possible, options.count, options.seed)
  files = [
    str(path.relative_to(ROOT))
    for pattern in JUDGES
    for path in sorted(ROOT.glob(pattern))
    if options.judges in str(path)
  ]
  if not files:
    raise ConfigError(
      "judges", options.judges, "is in the path of no file of tests that may judge; try routing/"
    )
  begun = time.monotonic()
  verdicts = run(chosen, files, options.processes, options.seconds, options.out)
  text = table(everything, verdicts, options.seed, time.monotonic() - begun)
  print(text, *(f"survived: {mutant}" for mutant, by in verdicts.items() if not by), sep="\n")
  if options.write:
    PAGE.write_text(replace(PAGE.read_text(), "mutation", text))
  return int(not all(verdicts.values()))


def drawn(all_mutants: Sequence[Mutant], count: int, seed: int) -> list[Mutant]:
  """Draws `count` mutants evenly over the files.

  It shuffles the mutants of each file, and takes every n-th one of all.
  """
  rng, by_file = random.Random(seed), {}
  for mutant in all_mutants:
    by_file.setdefault(mutant.path, []).append(mutant)
  shuffled = [
    mutant
    for mutants_of_file in by_file.values()
    for mutant in rng.sample(mutants_of_file, len(mutants_of_file))
  ]
  step = max(len(shuffled) / count, 1.0)
  return [shuffled[int(i * step)] for i in range(min(count, len(shuffled)))]


def table(
  everything: Mapping[str, Sequence[Mutant]],
  verdicts: Mapping[Mutant, str],
  seed: int,
  seconds: float,
) -> str:
  """Returns a Markdown table with a row for each part of the package."""
  lines = ["| changed | possible changes | drawn | noticed |", "|---|---:|---:|---:|"]

  def share(some):
    return f"{sum(map(bool, some))} ({sum(map(bool, some)) / max(len(some), 1):.1%})"

  for part, possible in everything.items():
    judged = [verdicts[mutant] for mutant in possible if mutant in verdicts]
    lines.append(f"| {part} | {len(possible):,} | {len(judged)} | {share(judged)} |")
  lines.append(
    f"| **all** | {sum(map(len, everything.values())):,} | {len(verdicts)} | "
    f"**{share(list(verdicts.values()))}** |"
  )
  return "\n".join(
    [*lines, "", f"Seed {seed}; {seconds / 60:.0f} minutes on {os.cpu_count()} cores."]
  )
