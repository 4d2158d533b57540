"""configs/base.py with changes."""

import functools


def config(changes=()):
  """The base config with {"dotted.key": value} set, whatever the types."""
  from configs import base  # not at the top: jaxtyping's import hook comes first

  c = base.get_config()
  for field, value in dict(changes).items():
    *parents, key = field.split(".")
    with c.unlocked(), c.ignore_type():
      functools.reduce(lambda node, name: node[name], parents, c)[key] = value
  return c
