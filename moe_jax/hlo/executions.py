"""How often each computation of a program runs in a step."""

from __future__ import annotations

import dataclasses

from moe_jax.hlo.collectives import op_name
from moe_jax.hlo.instruction import Instruction
from moe_jax.hlo.loops import trip_count
from moe_jax.hlo.matmuls import flops
from moe_jax.hlo.module import Module

_BRANCHES = ("branch_computations", "true_computation", "false_computation")
_INLINE = (
  "fusion",
  "async-start",
  "custom-call",
)  # what they run is one operation to memory and the scheduler
_Costs = dict[str, tuple[float, float]]  # of computations


@dataclasses.dataclass
class Run:
  """How a computation runs.

  Attributes:
    times: executions a step, loops multiplied out.
    once: the same with each loop's body counted once.
    fused: it is the inside of one operation.
    op_name: of the operation whose inside it is; "" otherwise.
  """

  times: float = 0.0
  once: float = 0.0
  fused: bool = False
  op_name: str = ""


def executions(module: Module) -> tuple[dict[str, Run], int]:
  """(how each computation that is reached runs, loops whose trip count is not known).

  Those loops count as one iteration. Of a conditional only the costliest branch is reached: that
  with most FLOPs, and if they are equal, the one whose results have most bytes.
  """
  runs, unknown, known = {module.entry: Run(1.0, 1.0)}, 0, {}
  for name in _callers_first(module, known):
    run = runs[name]
    for instruction in module[name]:
      trips = trip_count(module, instruction) if instruction.opcode == "while" else 1
      unknown += trips is None
      for callee in _run_by(module, instruction, known):
        inner = runs.setdefault(callee, Run())
        inner.times += run.times * (1 if trips is None else trips)
        inner.once += run.once
        inner.fused = run.fused or instruction.opcode in _INLINE
        inner.op_name = (op_name(instruction) or run.op_name) if inner.fused else ""
  return runs, unknown


def _run_by(module: Module, instruction: Instruction, known: _Costs) -> list[str]:
  """Computations that an instruction runs: of a conditional's branches one."""
  branches = [name for role, name in instruction.called if role in _BRANCHES]
  others = [name for role, name in instruction.called if role not in _BRANCHES]
  return others + ([max(branches, key=lambda name: _cost(module, name, known))] if branches else [])


def _callers_first(module: Module, known: _Costs) -> list[str]:
  order: list[str] = []
  seen: set[str] = set()

  def visit(name: str):
    seen.add(name)
    for instruction in module[name]:
      for callee in _run_by(module, instruction, known):
        if callee not in seen:
          visit(callee)
    order.append(name)

  visit(module.entry)
  return order[::-1]


def _cost(module: Module, name: str, known: _Costs) -> tuple[float, float]:
  """(FLOPs, bytes of results) of one execution, remembered in `known`."""
  if name not in known:
    work = size = 0.0
    for instruction in module[name]:
      work += flops(module[name], instruction)
      size += sum(shape.bytes for shape in instruction.shapes)
      trips = (trip_count(module, instruction) or 1) if instruction.opcode == "while" else 1
      for callee in _run_by(module, instruction, known):
        inner = _cost(module, callee, known)
        work, size = work + trips * inner[0], size + trips * inner[1]
    known[name] = work, size
  return known[name]
