"""What bounds a step: matmuls, memory, or one of the networks. A compiler's and a table's
estimates, not measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from moe_jax.dryrun.machine import interconnect
from moe_jax.dryrun.machine.chips import Chip
from moe_jax.hlo.program import Collective, Program

DAY = 86_400.0  # seconds


class Bound(NamedTuple):
  """Seconds a step of each resource if it alone were used and never waited, and what follows from
  the slowest.

  Attributes:
    matmuls: FLOPs of the program over the peak.
    memory: bytes between memory and chip over its bandwidth; more than needed where the compiler
      keeps values on chip.
    networks: mesh axes, joined by "+" -> seconds; NaN where the network's speed is not known.
    binds: "matmuls", "memory" or one of the networks.
    seconds: of that; no step is faster.
    tokens_per_second: of the whole machine, at most.
    mfu: ideal FLOPs over what the machine could do in that time, 0 to 1; recomputation and padding
      lower it.
    days: for all steps of the config.
    cycles: seconds by the compiler's own estimate of its instructions; None where it gives none.
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
  """All executions of one kind of collective over the same mesh axes in one step, of one device."""

  kind: str
  axes: str
  group_size: int
  network: str
  count: float
  bytes: float
  wire_bytes: float
  seconds: float


def moved(collectives: Iterable[Collective], mesh: Any, chip: Chip) -> list[Moved]:
  """Collectives summed by kind and mesh axes, the slowest first."""
  total: dict[tuple, Moved] = {}
  for c in collectives:
    where = interconnect.span(mesh, c.axes, chip)
    took = c.count * interconnect.seconds(c.kind, c.wire_bytes, c.group_size, where, chip)
    key = c.kind, "+".join(c.axes) or "?"
    before = total.get(key, Moved(*key, c.group_size, where.network, 0.0, 0.0, 0.0, 0.0))
    total[key] = before._replace(
      count=before.count + c.count,
      bytes=before.bytes + c.count * c.bytes,
      wire_bytes=before.wire_bytes + c.count * c.wire_bytes,
      seconds=before.seconds + took,
    )
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
  """The roofline of a program.

  Args:
    program: of one device and one step.
    sent: of `moved`.
    chip: of every device.
    num_devices: that run it.
    tokens: a step, of all devices.
    ideal_flops: a step, of all devices.
    steps: of the whole run.
  """
  networks: dict[str, float] = {}
  for t in sent:
    networks[t.axes] = networks.get(t.axes, 0.0) + t.seconds
  times = {"matmuls": program.flops / chip.flops, "memory": program.hbm_bytes / chip.hbm}
  known = times | {axes: took for axes, took in networks.items() if math.isfinite(took)}
  binds = max(known, key=known.get)
  slowest = known[binds]
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
