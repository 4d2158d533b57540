"""How long a collective occupies the links between devices, from where its mesh axes lie on the
machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from moe_jax.dryrun.machine.chips import Chip

PERMUTES = ("collective-permute", "collective-broadcast", "send", "recv")
ALL_TO_ALL = "all-to-all"  # in the names of all kinds of it


class Span(NamedTuple):
  """What the devices of one group of a collective span.

  Attributes:
    network: "ici" (a torus), "core" (the cores of one chip), "dcn" (between slices or hosts),
      "nvlink".
    rings: (chips, whether the ends are connected) of each dimension of the torus; () elsewhere.
  """

  network: str
  rings: tuple[tuple[int, bool], ...] = ()


def span(mesh: Any, axes: Sequence[str], chip: Chip) -> Span:
  """Where devices that differ only in these mesh axes lie (none: in all axes); all groups are taken
  for the first."""
  first = tuple(
    slice(None) if name in (axes or mesh.axis_names) else slice(1) for name in mesh.axis_names
  )
  group, everyone = list(mesh.devices[first].flat), list(mesh.devices.flat)
  if chip.platform == "cuda":
    return Span("dcn" if len({device.process_index for device in group}) > 1 else "nvlink")
  if len({getattr(device, "slice_index", 0) for device in group}) > 1:
    return Span("dcn")

  def sides(devices):
    return [len(set(places)) for places in zip(*(device.coords for device in devices), strict=True)]

  rings = tuple(
    (side, side == whole and chip.ring(whole))
    for side, whole in zip(sides(group), sides(everyone), strict=True)
    if side > 1
  )
  return Span("ici", rings) if rings else Span("core")


def seconds(kind: str, wire_bytes: float, group_size: int, where: Span, chip: Chip) -> float:
  """Seconds of one execution at full speed of all links that the group has: nothing else is in the
  way.

  A torus moves gathers and reductions along all its dimensions at once, in both directions where
  the ends are connected. Of an all-to-all each half of a ring sends to the other: on n chips the
  links in the middle carry B n / 8 bytes of the B that a device sends in all, and twice that on a
  line. Neighbours of a permutation share one link.

  Args:
    kind: HLO's name of the collective.
    wire_bytes: sent by one device.
    group_size: devices that take part.
    where: of `span`.
    chip: whose `link` and `dcn` count; NaN where there is no figure.
  """
  if where.network == "core":
    return wire_bytes / chip.hbm
  if where.network == "dcn":
    return wire_bytes * chip.devices / chip.dcn if chip.dcn else math.nan
  rate = chip.link / chip.devices
  if where.network == "nvlink" or kind.startswith(PERMUTES):
    return wire_bytes / rate
  if ALL_TO_ALL in kind:
    sent = wire_bytes * group_size / max(group_size - 1, 1)
    return max(sent * side / (8 if ring else 4) for side, ring in where.rings) / rate
  return wire_bytes / (rate * sum(2 if ring else 1 for _, ring in where.rings))
