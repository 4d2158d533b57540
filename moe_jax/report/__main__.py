"""Rebuilds the report from the files of a workdir.

  python -m moe_jax.report DIR

DIR is the --workdir of a training run, finished or not. Prints the path of report.html.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from moe_jax.commands import guarded, take_flags
from moe_jax.commands.flags import positional
from moe_jax.report import write_report


def main(argv: Sequence[str]) -> int:
  """Prints the path of the written report and returns the exit code.

  Args:
    argv: The command line, beginning with the program's name.
  """

  def write_and_print_path(arguments: Sequence[str]) -> int:
    _, rest = take_flags(arguments[1:], (), config=False)
    print(write_report(Path(positional(rest, ["DIR"])[0])))
    return 0

  return guarded(argv, __doc__, write_and_print_path)


if __name__ == "__main__":
  sys.exit(main(sys.argv))
