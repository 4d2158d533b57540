"""How HLO writes which devices take part together, read as tuples of partitions."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

_SLICE = (
  100_000  # megascale's number of a device: this times (slice + 1), plus its number in the slice
)
_SUB_AXIS = re.compile(r"'?([^',:()]+)'?(?::\((\d+)\)(\d+))?")


def _ints(text):
  return [int(n) for n in re.findall(r"\d+", text or "")]


Groups = tuple[tuple[int, ...], ...]

LISTED = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}")
LINKED = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
SLICES = re.compile(r'_xla_megascale_target="?(\{.*?\}(?:x\{[\d:,]*\}|\}))')


def listed(found: Sequence[str | None]) -> Groups:
  """{{0,1},{2,3}}"""
  return tuple(tuple(_ints(group)) for group in re.findall(r"\{([\d,]+)\}", found[0]))


def iota(found: Sequence[str | None]) -> Groups:
  """[4,2]<=[2,4]T(1,0): 0, 1, 2... in the shape [2,4], transposed, then cut into 4 groups of 2."""
  shape, source, order = map(_ints, found)
  devices = np.arange(math.prod(source)).reshape(source).transpose(order or None)
  return tuple(map(tuple, devices.reshape(shape).tolist()))


def named(found: Sequence[str | None]) -> Groups:
  """mesh['a'=4,'b'=2] {'b'}; also of a permuted mesh, and of a part of an axis: 'a':(2)2 is size 2
  behind a part of 2."""
  axes, devices, over = found
  names, sizes = zip(
    *((name, int(size)) for name, size in re.findall(r"'?([\w.\-]+)'?=(\d+)", axes)), strict=True
  )
  array = np.arange(math.prod(sizes))
  if devices and devices.startswith("["):
    source, _, order = devices.partition("T")
    array = array.reshape(_ints(source)).transpose(_ints(order) or None)
  elif devices:
    array = np.array(_ints(devices))
  parts: dict[str, list[tuple[int, int]]] = {}
  for name, before, size in _SUB_AXIS.findall(over):
    parts.setdefault(name, []).append((int(before or 1), int(size or sizes[names.index(name)])))
  shape, grouped = [], []
  for name, size in zip(names, sizes, strict=True):
    done = 1
    for before, part in sorted(parts.get(name, [])):
      grouped.append(len(shape) + 1)
      shape += [before // done, part]
      done = before * part
    shape.append(size // done)
  array = array.reshape(shape)
  array = np.moveaxis(array, grouped, range(array.ndim - len(grouped), array.ndim))
  return tuple(map(tuple, array.reshape(-1, math.prod(shape[i] for i in grouped)).tolist()))


def linked(found: Sequence[str | None]) -> Groups:
  """Devices between which data travel, in one step or several."""
  group_of: dict[int, list[int]] = {}
  for source, target in re.findall(r"(\d+),(\d+)", found[0]):
    a, b = (group_of.setdefault(int(d), [int(d)]) for d in (source, target))
    if a is not b:
      a += b
      group_of |= dict.fromkeys(b, a)
  return tuple(map(tuple, {id(group): group for group in group_of.values()}.values()))


def slices(target: str, partitions: int) -> Groups:
  """Megascale's {1,2}x{0:7} (slices count from 1), {{100000,200000},..} or {{..->..},..} as places
  in the mesh.

  Only the slice of a place can be relied on: in it, megascale counts devices, not partitions.
  """
  if product := re.fullmatch(r"\{([\d,]+)\}x\{.*\}", target):
    return (tuple((n - 1) * partitions for n in _ints(product[1])),)
  groups = (_ints(group) for group in re.findall(r"\{([\d,\->]+)\}", target))
  return tuple(
    tuple((d // _SLICE - 1) * partitions + d % _SLICE for d in group) for group in groups
  )


READERS = {LISTED: listed, IOTA: iota, NAMED: named, LINKED: linked}
