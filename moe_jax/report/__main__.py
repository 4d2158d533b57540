"""`python -m moe_jax.report DIR`: makes report.html again from a workdir's files."""

import argparse
import sys
from pathlib import Path

from moe_jax.errors import ConfigError
from moe_jax.report import write_report


def main() -> int:
  parser = argparse.ArgumentParser(prog="python -m moe_jax.report", description=__doc__)
  parser.add_argument("workdir", type=Path, help="of a run, finished or not")
  try:
    print(write_report(parser.parse_args().workdir))
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
