"""The config in which every key has its default. An experiment's file is this plus its differences.

The keys are declared beside the code that uses them, with their types, bounds and meaning; see
docs/options.md, or `python -m moe_jax.train --help=model.moe` for one section.
"""

from moe_jax.assembly.sections import default_config


def get_config():
  """Returns the default config; its keys are locked, its values are not."""
  return default_config().lock()
