"""What the path of a weight says about it."""

from __future__ import annotations

from collections.abc import Sequence

from moe_jax.experts import AXES as EXPERT_AXES


def keys(path) -> tuple[str, ...]:
  """Returns the names along a path of `jax.tree_util`."""
  return tuple(
    str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry))))
    for entry in path
  )


def stacked(path: Sequence[str], rank: int) -> int:
  """Returns how many leading axes of a weight count layers (of a scan) and experts.

  Args:
    path: The names along the path of the weight.
    rank: The number of all axes of the weight.
  """
  layers = "repeats" in path
  return layers + (path[-1] in EXPERT_AXES and rank - layers == len(EXPERT_AXES[path[-1]]))
