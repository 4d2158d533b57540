"""What a program does a step on one device: FLOPs, collectives, memory traffic, from its optimised
HLO text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from moe_jax.hlo.collectives import Collective, collective, merged, part_of
from moe_jax.hlo.executions import executions
from moe_jax.hlo.matmuls import flops
from moe_jax.hlo.module import parse
from moe_jax.hlo.traffic import traffic

__all__ = ["Collective", "Program", "analyse"]


@dataclasses.dataclass(frozen=True)
class Program:
  """Of one device and one step.

  Attributes:
    flops: of dots and convolutions (2 a multiply-add), loops multiplied out; see `matmuls.flops`
      for kernels.
    flops_once: each loop's body once, as XLA's cost_analysis() counts.
    collectives: one entry for each distinct (kind, axes, bytes, dtype, op_name), the one that sends
      most first.
    hbm_bytes: an upper bound on what operations read from and write to main memory, loops
      multiplied out.
    cycles: the compiler's own estimate, loops multiplied out; None where it makes none. TPUs only;
      kernels and collectives have none, and in fast compiles it is many times too high.
    unknown_loops: loops whose trip count could not be derived; their bodies are counted once.
  """

  flops: float
  flops_once: float
  collectives: tuple[Collective, ...]
  hbm_bytes: float
  cycles: float | None
  unknown_loops: int


def analyse(text: str, mesh_shape: Mapping[str, int]) -> Program:
  """Reads what `compiled.as_text()` says of an SPMD program. Of a conditional, the costliest branch
  counts.

  Args:
    text: optimised HLO of TPU, GPU or CPU. A program over several slices is that of one slice;
      slices must be equal, consecutive parts of the mesh's flat order.
    mesh_shape: axis -> size in mesh order; partition p of the program is `mesh.devices.flat[p]`.

  Raises:
    ValueError: malformed text (names the line), or a program for another number of devices.
  """
  module = parse(text)
  devices = math.prod(mesh_shape.values())
  if devices % module.partitions:
    raise ValueError(f"a program for {module.partitions} devices on a mesh of {devices}")
  total, once, memory, cycles, found = 0.0, 0.0, 0.0, None, []
  runs, unknown = executions(module)
  for name, run in runs.items():
    computation = module[name]
    for instruction in computation:
      if work := flops(computation, instruction):
        total += run.times * work
        once += run.once * work
      if one := collective(module, instruction, mesh_shape, run.times, run.op_name):
        found.append((part_of(instruction), one))
      if not run.fused:
        memory += run.times * traffic(module, instruction)
        if estimate := instruction.find(r'"estimated_cycles":"(\d+)"'):
          cycles = (cycles or 0.0) + run.times * int(estimate[1])
  return Program(total, once, merged(found), memory, cycles, unknown)
