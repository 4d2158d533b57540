"""Which router at the same backbone, data order, seeds and activated FLOPs? README.md has question
and outcome.

  python -m experiments.compare_routers --scale=desk    trains what is not finished, then renews
                                                        tables and figures
  python -m experiments.compare_routers --scale=gpu     the same at about 100M activated parameters,
                                                        on one GPU
  python -m experiments.compare_routers --write         renews tables and figures of both from
                                                        results.jsonl alone

The flags of experiments/common/sweep.py hold: --print, --only, --processes, --devices, --workdir.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from experiments.common import sweep
from experiments.compare_routers import study, table
from moe_jax.train import guarded


def main(argv: Sequence[str]) -> int:
  """Does what the command line says; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog="python -m experiments.compare_routers",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  action = parser.add_mutually_exclusive_group(required=True)
  action.add_argument("--scale", choices=tuple(table.FOLDERS))
  action.add_argument("--write", action="store_true")
  given, rest = parser.parse_known_args(argv)
  if given.write:
    for scale in table.FOLDERS:
      table.write(scale)
    return 0
  # What is given later holds.
  code = sweep.main(
    [f"--workdir=runs/compare_routers/{given.scale}", *rest],
    study.rows(given.scale),
    table.HERE,
    str((table.FOLDERS[given.scale] / table.RESULTS).relative_to(table.HERE)),
  )
  if not code and "--print" not in rest:
    table.write(given.scale)
  return code


if __name__ == "__main__":
  sys.exit(guarded(sys.argv, None, lambda argv: main(argv[1:])))
