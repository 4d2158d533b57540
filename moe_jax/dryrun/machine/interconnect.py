"""Computes how long a collective occupies the links that its mesh axes use on the machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from moe_jax.dryrun.machine.chips import Chip

PERMUTES = ("collective-permute", "collective-broadcast", "send", "recv")
ALL_TO_ALL = "all-to-all"  # part of the names of all its kinds


class Span(NamedTuple):
  """The network that the devices of one group of a collective span.

  Attributes:
    network: "ici" (a torus of TPU chips), "core" (the cores of one chip), "dcn" (between slices or
      hosts) or "nvlink" (the GPUs of one host).
    rings: The (number of chips, whether the ends are connected) along each dimension of the torus
      in which the group extends. It is () for other networks.
  """

  network: str
  rings: tuple[tuple[int, bool], ...] = ()


def span(mesh: Any, axes: Sequence[str], chip: Chip) -> Span:
  """Returns what the devices span that differ only in the given mesh axes.

  All groups along the same axes are assumed to lie like the first one.

  Args:
    mesh: A mesh over the machine's devices.
    axes: Mesh axes along which the group extends. If it is empty, all axes count.
    chip: The kind of every device.
  """
  first = tuple(
    slice(None) if name in (axes or mesh.axis_names) else slice(1) for name in mesh.axis_names
  )
  group, all_devices = list(mesh.devices[first].flat), list(mesh.devices.flat)
  if chip.platform == "cuda":
    return Span("dcn" if len({device.process_index for device in group}) > 1 else "nvlink")
  if len({getattr(device, "slice_index", 0) for device in group}) > 1:
    return Span("dcn")

  # The number of distinct coordinates along each dimension of the torus.
  def sides(devices):
    return [len(set(places)) for places in zip(*(device.coords for device in devices), strict=True)]

  # The links that connect the ends are of use only to a group that takes the full dimension.
  rings = tuple(
    (side, side == full and chip.ring(full))
    for side, full in zip(sides(group), sides(all_devices), strict=True)
    if side > 1
  )
  return Span("ici", rings) if rings else Span("core")


def seconds(kind: str, wire_bytes: float, group_size: int, where: Span, chip: Chip) -> float:
  """Returns the seconds of one execution if all links of the group run at full speed.

  A torus moves gathers and reductions along all its dimensions at once, and in both directions if
  the ends are connected. In an all-to-all each half of a ring sends to the other half. If B is the
  bytes that a device sends to all chips, itself included, the links in the middle of a ring of n
  chips carry B n / 8 bytes, and those of a line carry twice that. A permutation uses one link
  between neighbours.

  Args:
    kind: HLO's name of the collective.
    wire_bytes: The bytes that one device sends.
    group_size: The number of devices that take part.
    where: What the group spans, as `span` returns it.
    chip: The kind of every device.

  Returns:
    Seconds, or NaN if the collective goes over a network whose speed is unknown.
  """
  if where.network == "core":
    return wire_bytes / chip.hbm
  if where.network == "dcn":
    return wire_bytes * chip.devices / chip.dcn if chip.dcn else math.nan
  rate = chip.link / chip.devices
  if where.network == "nvlink" or kind.startswith(PERMUTES):
    return wire_bytes / rate
  if ALL_TO_ALL in kind:
    # wire_bytes leaves out the (1 / n)th that a device keeps, which the formula above includes.
    sent = wire_bytes * group_size / max(group_size - 1, 1)
    return max(sent * side / (8 if ring else 4) for side, ring in where.rings) / rate
  return wire_bytes / (rate * sum(2 if ring else 1 for _, ring in where.rings))
