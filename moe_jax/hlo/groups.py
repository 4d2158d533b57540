"""Finds which devices take part together in a collective, and along which mesh axes they lie."""

from __future__ import annotations

import functools
import math
import re

import numpy as np

from moe_jax.hlo import notations
from moe_jax.hlo.instruction import Instruction

UNKNOWN = ("?",)
Mesh = tuple[tuple[str, int], ...]  # (axis, size) in mesh order


def reach(instruction: Instruction, mesh: Mesh, partitions: int) -> tuple[tuple[str, ...], int]:
  """Returns the mesh axes along which a collective's groups extend, and the largest group's size.

  The axes are in mesh order. They are known if every group is a box of the mesh and all groups
  extend along the same axes; otherwise they are ("?",). A box may cover only a part of an axis, and
  then it has fewer devices than the axis. The axes are () if every group has one device. For a
  transfer between slices they are the axes along which the slices differ.

  Args:
    instruction: A collective.
    mesh: Pairs of axis name and size, in mesh order.
    partitions: The number of devices that the program runs on, which is one slice's.

  Raises:
    ValueError: If the collective has no groups, if their notation is unknown, or if they contain
      devices that the mesh lacks.
  """
  if _groups_are_replicas(instruction):
    return _extent((tuple(range(partitions)),), mesh)
  for notation in (notations.SLICES, *notations.READERS):
    if match := instruction.find(notation):
      try:
        return _reach(notation, match[0], mesh, partitions)
      except ValueError as error:
        raise instruction.error(str(error)) from error
  raise instruction.error("a collective whose groups are not understood")


def _groups_are_replicas(instruction: Instruction) -> bool:
  """Returns whether the groups list replicas, each of which stands for all of its partitions.

  An SPMD program has one replica, so that the collective then runs across all partitions.
  """
  return (
    "channel_id=" in instruction.tail
    and "use_global_device_ids=true" not in instruction.tail
    and re.match("all-reduce|all-gather|reduce-scatter", instruction.opcode) is not None
  )


# The layers of a model repeat the same few groups, so the results are cached by their text.
@functools.lru_cache(maxsize=512)
def _reach(
  notation: re.Pattern, text: str, mesh: Mesh, partitions: int
) -> tuple[tuple[str, ...], int]:
  fields = notation.match(text).groups()
  if notation is notations.SLICES:
    groups = notations.slices(fields[0], partitions)
    # Each device is replaced by the first one of its slice, and duplicates are dropped: only the
    # slice of a device can be relied on.
    axes, _ = _extent(
      tuple(tuple({d // partitions * partitions: None for d in g}) for g in groups), mesh
    )
    return axes, max(map(len, groups), default=1)
  # An empty list of groups means one group of all partitions.
  return _extent(notations.READERS[notation](fields) or (tuple(range(partitions)),), mesh)


def _extent(groups: notations.Groups, mesh: Mesh) -> tuple[tuple[str, ...], int]:
  """Returns the mesh axes along which groups of device numbers extend, and the largest size."""
  sizes = [size for _, size in mesh]
  if max(map(max, groups), default=0) >= math.prod(sizes):
    raise ValueError(f"the groups name more devices than the mesh {dict(mesh)} has")
  by_size: dict[int, list] = {}
  for group in groups:
    by_size.setdefault(len(group), []).append(group)
  boxes, along = True, []
  for size, same_size in by_size.items():
    if size > 1:
      # Coordinates on the mesh, [axes, groups, size], sorted within each group and axis so that
      # distinct coordinates can be counted by their differences.
      places = np.sort(np.stack(np.unravel_index(np.array(same_size), sizes)), axis=-1)
      distinct = 1 + (np.diff(places, axis=-1) != 0).sum(-1)
      # A group is a box exactly if it has as many devices as combinations of its coordinates.
      boxes &= bool((distinct.prod(0) == size).all())
      along.append(distinct > 1)
  if not along:
    return (), 1
  varies = np.concatenate(along, axis=1)  # [axes, groups]
  if not boxes or (varies != varies[:, :1]).any():
    return UNKNOWN, max(by_size)
  return tuple(axis for (axis, _), extends in zip(mesh, varies[:, 0], strict=True) if extends), max(
    by_size
  )
