"""Finds whether matmuls, memory or a network bounds a step, and how fast the step can be at best.

All figures follow from the compiled program and the table of chips. None is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from moe_jax.dryrun.machine import interconnect
from moe_jax.dryrun.machine.chips import Chip
from moe_jax.hlo.program import Collective, Program

DAY = 86_400.0  # seconds


class Bound(NamedTuple):
  """The roofline of a step: the time that each resource needs, and what follows from the slowest.

  The time of a resource is what a step would take if the resource were busy all the time and
  nothing else mattered.

  Attributes:
    matmuls: Seconds for the program's FLOPs at the chip's peak.
    memory: Seconds for the program's memory traffic at the chip's bandwidth. It is an upper bound,
      because the compiler may keep values on the chip.
    networks: Mesh axes, joined by "+", to seconds. NaN means that the network's speed is unknown.
    binds: The slowest resource: "matmuls", "memory" or a key of `networks`.
    seconds: The time of the slowest resource, which is the estimate of the shortest step.
    tokens_per_second: The most that the whole machine can process at that time a step.
    mfu: The ideal FLOPs divided by what the machine could do in that time, from 0 to 1.
      Recomputation and padding lower it.
    days: The time for all steps of the config.
    cycles: Seconds by the compiler's own estimate of its instructions, or None if it gives none.
  """

  matmuls: float
  memory: float
  networks: Mapping[str, float]
  binds: str
  seconds: float
  tokens_per_second: float
  mfu: float
  days: float
  cycles: float | None


class Moved(NamedTuple):
  """All executions of one kind of collective over the same mesh axes, on one device in one step.

  Attributes:
    kind: The kind, as in `Collective.kind`.
    axes: The mesh axes, joined by "+", or "?" if there are none or they are unknown.
    group_size: The number of devices that take part together.
    network: The network between them, as in `interconnect.Span.network`.
    count: The number of executions.
    bytes: The sum over executions of `Collective.bytes`.
    wire_bytes: The bytes that the device sends.
    seconds: The time at full speed of the links, or NaN if their speed is unknown.
  """

  kind: str
  axes: str
  group_size: int
  network: str
  count: float
  bytes: float
  wire_bytes: float
  seconds: float


def moved(collectives: Iterable[Collective], mesh: Any, chip: Chip) -> list[Moved]:
  """Returns the collectives summed by kind and mesh axes, with the slowest first.

  Args:
    collectives: The collectives of a program.
    mesh: The mesh that the program was compiled for.
    chip: The kind of every device.
  """
  total: dict[tuple, Moved] = {}
  for c in collectives:
    where = interconnect.span(mesh, c.axes, chip)
    duration = c.count * interconnect.seconds(c.kind, c.wire_bytes, c.group_size, where, chip)
    key = c.kind, "+".join(c.axes) or "?"
    earlier = total.get(key, Moved(*key, c.group_size, where.network, 0.0, 0.0, 0.0, 0.0))
    total[key] = earlier._replace(
      count=earlier.count + c.count,
      bytes=earlier.bytes + c.count * c.bytes,
      wire_bytes=earlier.wire_bytes + c.count * c.wire_bytes,
      seconds=earlier.seconds + duration,
    )
  # NaN compares with nothing, so collectives of unknown time are explicitly put first.
  return sorted(total.values(), key=lambda t: -t.seconds if math.isfinite(t.seconds) else -math.inf)


def bound(
  program: Program,
  sent: Iterable[Moved],
  chip: Chip,
  num_devices: int,
  tokens: int,
  ideal_flops: float,
  steps: int,
) -> Bound:
  """Returns the roofline of a program.

  Args:
    program: What one device does in one step.
    sent: The program's collectives, as `moved` returns them.
    chip: The kind of every device.
    num_devices: The number of devices that run the program.
    tokens: The tokens that all devices together process in a step.
    ideal_flops: The FLOPs that the model needs in a step, over all devices.
    steps: The number of steps of the whole run.
  """
  networks: dict[str, float] = {}
  for t in sent:
    networks[t.axes] = networks.get(t.axes, 0.0) + t.seconds
  times = {"matmuls": program.flops / chip.flops, "memory": program.hbm_bytes / chip.hbm}
  # A network whose speed is unknown cannot bind.
  finite = times | {
    axes: duration for axes, duration in networks.items() if math.isfinite(duration)
  }
  binds = max(finite, key=finite.__getitem__)
  slowest = finite[binds]
  cycles = program.cycles / chip.clock if program.cycles and chip.clock else None

  def rate(amount):
    return amount / slowest if slowest else math.inf

  return Bound(
    times["matmuls"],
    times["memory"],
    networks,
    binds,
    slowest,
    rate(tokens),
    rate(ideal_flops) / (chip.flops * num_devices),
    steps * slowest / DAY,
    cycles,
  )
