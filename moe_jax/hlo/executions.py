"""Counts how often each computation of a program runs in a step."""

from __future__ import annotations

import dataclasses

from moe_jax.hlo.collectives import op_name
from moe_jax.hlo.instruction import Instruction
from moe_jax.hlo.loops import trip_count
from moe_jax.hlo.matmuls import flops
from moe_jax.hlo.module import Module

_BRANCHES = ("branch_computations", "true_computation", "false_computation")
# The memory system and the scheduler see all that one of these runs as a single operation.
_INLINE = ("fusion", "async-start", "custom-call")
_Costs = dict[str, tuple[float, float]]  # computation -> (FLOPs, bytes of results)


@dataclasses.dataclass
class Run:
  """How a computation runs.

  Attributes:
    times: Executions in a step, with loops multiplied out.
    once: Executions in a step if the body of each loop ran once.
    fused: Whether the computation is the inside of one operation, such as a fusion.
    op_name: The JAX name of the operation whose inside it is. It is "" if it is not fused.
  """

  times: float = 0.0
  once: float = 0.0
  fused: bool = False
  op_name: str = ""


def executions(module: Module) -> tuple[dict[str, Run], int]:
  """Returns how each reachable computation runs, and the number of loops with unknown trip count.

  A loop with an unknown trip count counts as one iteration. Only the costliest branch of a
  conditional is reachable: the one with the most FLOPs or, if these are equal, the one whose
  results have the most bytes.
  """
  runs, unknown, costs = {module.entry: Run(1.0, 1.0)}, 0, {}
  # Callers come first, so a computation's counts are complete before its callees use them.
  for name in _callers_first(module, costs):
    run = runs[name]
    for instruction in module[name]:
      trips = trip_count(module, instruction) if instruction.opcode == "while" else 1
      unknown += trips is None
      for callee in _run_by(module, instruction, costs):
        inner = runs.setdefault(callee, Run())
        inner.times += run.times * (1 if trips is None else trips)
        inner.once += run.once
        inner.fused = run.fused or instruction.opcode in _INLINE
        inner.op_name = (op_name(instruction) or run.op_name) if inner.fused else ""
  return runs, unknown


def _run_by(module: Module, instruction: Instruction, costs: _Costs) -> list[str]:
  """Returns the computations that an instruction runs, with only one branch of a conditional."""
  branches = [name for role, name in instruction.called if role in _BRANCHES]
  others = [name for role, name in instruction.called if role not in _BRANCHES]
  return others + ([max(branches, key=lambda name: _cost(module, name, costs))] if branches else [])


def _callers_first(module: Module, costs: _Costs) -> list[str]:
  """Returns the reachable computations in an order in which callers precede their callees."""
  order: list[str] = []
  visited: set[str] = set()

  def visit(name: str):
    visited.add(name)
    for instruction in module[name]:
      for callee in _run_by(module, instruction, costs):
        if callee not in visited:
          visit(callee)
    order.append(name)

  visit(module.entry)
  return order[::-1]


def _cost(module: Module, name: str, costs: _Costs) -> tuple[float, float]:
  """Returns the FLOPs and the bytes of results of one execution, and caches them in `costs`."""
  if name not in costs:
    work = size = 0.0
    for instruction in module[name]:
      work += flops(module[name], instruction)
      size += sum(shape.bytes for shape in instruction.shapes)
      trips = (trip_count(module, instruction) or 1) if instruction.opcode == "while" else 1
      for callee in _run_by(module, instruction, costs):
        inner = _cost(module, callee, costs)
        work, size = work + trips * inner[0], size + trips * inner[1]
    costs[name] = work, size
  return costs[name]
