"""Which devices take part together in a collective, and along which mesh axes they lie."""

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
  """The mesh axes along which the groups of a collective extend, in mesh order, and devices a group
  (the largest).

  Where a group is a box of the mesh, or of a part of an axis (then it has fewer devices than the
  axis), and all groups extend along the same axes, these are the axes; elsewhere they are ("?",).
  () are groups of one device. Of transfers between slices the axes are those along which the slices
  differ.

  Raises:
    ValueError: a collective without groups, in a notation that is not known, or with devices that
      the mesh lacks.
  """
  if _across_all(instruction):
    return _extent((tuple(range(partitions)),), mesh)
  for notation in (notations.SLICES, *notations.READERS):
    if match := instruction.find(notation):
      try:
        return _reach(notation, match[0], mesh, partitions)
      except ValueError as error:
        raise instruction.error(str(error)) from error
  raise instruction.error("a collective whose groups are not understood")


def _across_all(instruction: Instruction) -> bool:
  """Whether the groups are of replicas (of which there is one) and each stands for all its
  partitions."""
  return (
    "channel_id=" in instruction.tail
    and "use_global_device_ids=true" not in instruction.tail
    and re.match("all-reduce|all-gather|reduce-scatter", instruction.opcode) is not None
  )


@functools.lru_cache(maxsize=512)
def _reach(
  notation: re.Pattern, text: str, mesh: Mesh, partitions: int
) -> tuple[tuple[str, ...], int]:
  found = notation.match(text).groups()
  if notation is notations.SLICES:
    groups = notations.slices(found[0], partitions)
    axes, _ = _extent(
      tuple(tuple({d // partitions * partitions: None for d in g}) for g in groups), mesh
    )
    return axes, max(map(len, groups), default=1)
  return _extent(notations.READERS[notation](found) or (tuple(range(partitions)),), mesh)


def _extent(groups: notations.Groups, mesh: Mesh) -> tuple[tuple[str, ...], int]:
  sizes = [size for _, size in mesh]
  if max(map(max, groups), default=0) >= math.prod(sizes):
    raise ValueError(f"the groups name more devices than the mesh {dict(mesh)} has")
  by_size: dict[int, list] = {}
  for group in groups:
    by_size.setdefault(len(group), []).append(group)
  boxes, along = True, []
  for size, alike in by_size.items():
    if size > 1:
      places = np.sort(
        np.stack(np.unravel_index(np.array(alike), sizes)), axis=-1
      )  # [axes, groups, size]
      distinct = 1 + (np.diff(places, axis=-1) != 0).sum(-1)
      boxes &= bool((distinct.prod(0) == size).all())
      along.append(distinct > 1)
  if not along:
    return (), 1
  varies = np.concatenate(along, axis=1)
  if not boxes or (varies != varies[:, :1]).any():
    return UNKNOWN, max(by_size)
  return tuple(axis for (axis, _), here in zip(mesh, varies[:, 0], strict=True) if here), max(
    by_size
  )
