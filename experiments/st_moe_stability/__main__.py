"""ST-MoE's ablations of stability and design; README.md beside this file has question and outcome.

  python -m experiments.st_moe_stability --scale=desk            trains what is not finished, renews
    tables and figures
  python -m experiments.st_moe_stability --scale=gpu             the same rows with 100M activated
    parameters on one GPU
  python -m experiments.st_moe_stability --scale=paper --print   the commands of the paper's size,
    for a pod
  python -m experiments.st_moe_stability --search                trains what was tried for a base
    that is fragile
  python -m experiments.st_moe_stability --write                 renews tables and figures from the
    .jsonl files alone

The flags of experiments/common/sweep.py hold after --scale and --search, as --processes=2.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Sequence

from experiments.common import sweep
from experiments.scaling_laws.figures import need_pyplot
from experiments.st_moe_stability import figures, rows, table
from experiments.st_moe_stability.outcome import CURVES, outcome
from moe_jax.errors import ConfigError
from moe_jax.train import guarded

HERE = table.README.parent
FILES = {
  "desk": "results.jsonl",
  "gpu": "gpu.jsonl",
  "paper": "paper.jsonl",
  "search": "search.jsonl",
}


def main(argv: Sequence[str]) -> int:
  """Does what the command line says; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog="python -m experiments.st_moe_stability",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  action = parser.add_mutually_exclusive_group(required=True)
  action.add_argument("--scale", choices=tuple(rows.SCALES))
  action.add_argument("--search", action="store_true")
  action.add_argument("--write", action="store_true")
  given, rest = parser.parse_known_args(argv)
  what, prints = given.scale or "search", "--print" in rest
  try:
    if given.write and rest:
      raise ConfigError(
        "experiments.st_moe_stability", " ".join(rest), "belongs to --scale or --search"
      )
    if not prints:
      need_pyplot()  # said now, not after the runs
    if not given.write:
      chosen = rows.search() if given.search else rows.rows(rows.SCALES[what])
      code = sweep.main(rest, chosen, HERE, FILES[what])
      if prints or what in ("gpu", "paper"):
        return code
      thin(HERE / FILES[what])
      if code:
        return code
    write()
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


def thin(results: pathlib.Path) -> None:
  """Leaves of the curves in a file of results those that the study reads, which makes it a quarter
  as large."""
  if not results.exists():
    return
  lines = sweep.load(results).values()
  kept = [
    line | {"train": {name: line["train"][name] for name in CURVES}, "load": {}} for line in lines
  ]
  partial = results.with_suffix(".partial")
  partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
  os.replace(partial, results)


def write() -> None:
  """Renews the README's tables and the figures."""
  table.write()
  found = {name: outcome(line) for name, line in sweep.load(table.RESULTS).items()}
  if found:
    figures.draw(found, HERE)


if __name__ == "__main__":
  sys.exit(guarded(sys.argv, None, lambda argv: main(argv[1:])))
