"""Returns configs/base.py with changes."""

import functools


def config(changes=()):
  """Returns the base config with {"dotted.key": value} set, even to values of other types."""
  # Imported here because jaxtyping's import hook must come first.
  from configs import base

  c = base.get_config()
  for field, value in dict(changes).items():
    *parents, key = field.split(".")
    with c.unlocked(), c.ignore_type():
      functools.reduce(lambda node, name: node[name], parents, c)[key] = value
  return c
