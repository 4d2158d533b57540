"""Analyses what a program does in a step on one device: FLOPs, collectives and memory traffic.

The program is read from its optimised HLO text.
"""

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
  """What one device does in one step.

  Attributes:
    flops: FLOPs of dots and convolutions (2 a multiply-add), with loops multiplied out. See
      `matmuls.flops` for what counts of kernels.
    flops_once: The FLOPs if the body of each loop ran once, as XLA's cost_analysis() counts.
    collectives: One entry for each distinct (kind, axes, bytes, dtype, op_name). The one that sends
      most in a step comes first.
    hbm_bytes: An upper bound on the bytes that operations read from and write to main memory, with
      loops multiplied out.
    cycles: The compiler's own estimate of clock cycles, with loops multiplied out, or None if the
      program carries none. Only TPU programs carry it. Kernels and collectives have no estimate,
      and in fast compiles the estimate is many times too high.
    unknown_loops: The number of loops whose trip count could not be derived. Their bodies are
      counted once.
  """

  flops: float
  flops_once: float
  collectives: tuple[Collective, ...]
  hbm_bytes: float
  cycles: float | None
  unknown_loops: int


def analyse(text: str, mesh_shape: Mapping[str, int]) -> Program:
  """Analyses an SPMD program, given as the text that `compiled.as_text()` returns.

  Only the costliest branch of a conditional counts.

  Args:
    text: Optimised HLO for TPU, GPU or CPU. The program of several slices is that of one slice, and
      the slices must be equal, consecutive parts of the mesh in its flat order.
    mesh_shape: Axis name to size, in mesh order. Partition p of the program runs on
      `mesh.devices.flat[p]`.

  Raises:
    ValueError: If the text is malformed (the message names the line), or if the number of devices
      in the mesh is not a multiple of the program's.
  """
  module = parse(text)
  devices = math.prod(mesh_shape.values())
  if devices % module.partitions:
    raise ValueError(f"a program for {module.partitions} devices on a mesh of {devices}")
  total, once, memory, cycles, collectives = 0.0, 0.0, 0.0, None, []
  runs, unknown = executions(module)
  for name, run in runs.items():
    computation = module[name]
    for instruction in computation:
      if work := flops(computation, instruction):
        total += run.times * work
        once += run.once * work
      if transfer := collective(module, instruction, mesh_shape, run.times, run.op_name):
        collectives.append((part_of(instruction), transfer))
      # Values inside a fusion never reach main memory: the fusion's own line has its traffic.
      if not run.fused:
        memory += run.times * traffic(module, instruction)
        if estimate := instruction.find(r'"estimated_cycles":"(\d+)"'):
          cycles = (cycles or 0.0) + run.times * int(estimate[1])
  return Program(total, once, merged(collectives), memory, cycles, unknown)
