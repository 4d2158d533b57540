"""`python -m experiments`: the command of all studies and tools."""

import sys

from experiments.common import command_line

if __name__ == "__main__":
  sys.exit(command_line.main(sys.argv))
