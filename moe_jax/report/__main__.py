"""`python -m moe_jax.report DIR`: makes report.html again from a workdir's files."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from moe_jax.report import write_report
from moe_jax.train import guarded


def main() -> int:
  parser = argparse.ArgumentParser(prog="python -m moe_jax.report", description=__doc__)
  parser.add_argument("workdir", type=Path, help="of a run, finished or not")

  def say(rest: Sequence[str]) -> int:
    print(write_report(parser.parse_args(rest[1:]).workdir))
    return 0

  return guarded(sys.argv, None, say)


if __name__ == "__main__":
  sys.exit(main())
