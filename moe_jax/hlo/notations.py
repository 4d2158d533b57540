"""Reads HLO's notations for groups of devices as tuples of partition numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

# Megascale numbers a device by this times (slice + 1), plus the device's number in its slice.
_SLICE = 100_000
_SUB_AXIS = re.compile(r"'?([^',:()]+)'?(?::\((\d+)\)(\d+))?")


def _ints(text):
  return [int(n) for n in re.findall(r"\d+", text or "")]


Groups = tuple[tuple[int, ...], ...]
# The groups of a match, as `re.Match.groups` returns them. An optional group may be None.
_Fields = Sequence[str | Any]

LISTED = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}")
LINKED = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
SLICES = re.compile(r'_xla_megascale_target="?(\{.*?\}(?:x\{[\d:,]*\}|\}))')


def listed(fields: _Fields) -> Groups:
  """Reads groups that are written out, such as {{0,1},{2,3}}.

  Args:
    fields: The groups of a match of `LISTED`.
  """
  return tuple(tuple(_ints(group)) for group in re.findall(r"\{([\d,]+)\}", fields[0]))


def iota(fields: _Fields) -> Groups:
  """Reads groups that are written as a reshaped range of numbers, such as [4,2]<=[2,4]T(1,0).

  In the example the numbers 0, 1, 2... take the shape [2,4], are transposed, and are then cut into
  4 groups of 2.

  Args:
    fields: The groups of a match of `IOTA`.
  """
  shape, source, order = map(_ints, fields)
  devices = np.arange(math.prod(source)).reshape(source).transpose(order or None)
  return tuple(map(tuple, devices.reshape(shape).tolist()))


def named(fields: _Fields) -> Groups:
  """Reads groups that extend along named axes of a mesh, such as mesh['a'=4,'b'=2] {'b'}.

  The mesh may list its devices in another order. A group may extend along a part of an axis:
  'a':(2)2 is the part of size 2 that comes after a more significant part of size 2.

  Args:
    fields: The groups of a match of `NAMED`.
  """
  axes, devices, over = fields
  names, sizes = zip(
    *((name, int(size)) for name, size in re.findall(r"'?([\w.\-]+)'?=(\d+)", axes)), strict=True
  )
  array = np.arange(math.prod(sizes))
  if devices and devices.startswith("["):
    # The order is written as in `iota`.
    source, _, order = devices.partition("T")
    array = array.reshape(_ints(source)).transpose(_ints(order) or None)
  elif devices:
    array = np.array(_ints(devices))
  # For each axis, the (product of the sizes before the part, size of the part) of the parts along
  # which the groups extend. A whole axis is the part (1, size).
  parts: dict[str, list[tuple[int, int]]] = {}
  for name, before, size in _SUB_AXIS.findall(over):
    parts.setdefault(name, []).append((int(before or 1), int(size or sizes[names.index(name)])))
  # Each axis is split into dimensions that lie within a group (`grouped`) and dimensions that
  # separate the groups. The former are then moved to the end.
  shape, grouped = [], []
  for name, size in zip(names, sizes, strict=True):
    covered = 1
    for before, part in sorted(parts.get(name, [])):
      grouped.append(len(shape) + 1)
      shape += [before // covered, part]
      covered = before * part
    shape.append(size // covered)
  array = array.reshape(shape)
  array = np.moveaxis(array, grouped, range(array.ndim - len(grouped), array.ndim))
  return tuple(map(tuple, array.reshape(-1, math.prod(shape[i] for i in grouped)).tolist()))


def linked(fields: _Fields) -> Groups:
  """Reads source-target pairs as groups of devices between which data travel, in one or more steps.

  Args:
    fields: The groups of a match of `LINKED`.
  """
  group_of: dict[int, list[int]] = {}
  for source, target in re.findall(r"(\d+),(\d+)", fields[0]):
    a, b = (group_of.setdefault(int(d), [int(d)]) for d in (source, target))
    # Two groups that a pair connects become one.
    if a is not b:
      a += b
      group_of |= dict.fromkeys(b, a)
  return tuple(map(tuple, {id(group): group for group in group_of.values()}.values()))


def slices(target: str, partitions: int) -> Groups:
  """Reads the target of a transfer between slices as groups of places in the mesh.

  Megascale writes {1,2}x{0:7}, where slices count from 1, or {{100000,200000},..}, or
  {{..->..},..}. Only the slice of a place can be relied on: within a slice megascale counts
  devices, and not partitions.

  Args:
    target: The field of a match of `SLICES`.
    partitions: The number of devices of one slice.
  """
  if product := re.fullmatch(r"\{([\d,]+)\}x\{.*\}", target):
    return (tuple((n - 1) * partitions for n in _ints(product[1])),)
  groups = (_ints(group) for group in re.findall(r"\{([\d,\->]+)\}", target))
  return tuple(
    tuple((d // _SLICE - 1) * partitions + d % _SLICE for d in group) for group in groups
  )


READERS = {LISTED: listed, IOTA: iota, NAMED: named, LINKED: linked}
