"""`python -m experiments`: the command of all studies and tools."""

import sys

from moe_jax.errors import jax_is_missing

if __name__ == "__main__":
  if jax_is_missing():
    sys.exit(1)
  # Imported here, because it needs what is installed with JAX.
  from experiments.common import command_line

  sys.exit(command_line.main(sys.argv))
