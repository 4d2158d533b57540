"""Rebuilds report.html from the files in a workdir: `python -m moe_jax.report DIR`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from moe_jax.commands import guarded
from moe_jax.report import write_report


def main() -> int:
  """Runs the command, prints the path of the written report, and returns the exit code."""
  parser = argparse.ArgumentParser(prog="python -m moe_jax.report", description=__doc__)
  parser.add_argument("workdir", type=Path, help="the --workdir of a training run, finished or not")

  def write_and_print_path(rest: Sequence[str]) -> int:
    print(write_report(parser.parse_args(rest[1:]).workdir))
    return 0

  return guarded(sys.argv, None, write_and_print_path)


if __name__ == "__main__":
  sys.exit(main())
