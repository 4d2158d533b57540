"""How many FLOPs the matmuls of a compiled program do: those that XLA makes of it, not those that
were written."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

from moe_jax.hlo import matmuls
from moe_jax.hlo.collectives import op_name
from moe_jax.hlo.instruction import Instruction
from moe_jax.hlo.loops import trip_count
from moe_jax.hlo.module import Computation, Module, parse


def matmul_flops(
  function: Callable, *args: Any, trips: Mapping[str, int | float] | None = None
) -> float:
  """Returns the FLOPs (2 a multiply-add) of all matmuls that a call of `function` executes, by the
  optimised HLO.

  `compiled.cost_analysis()` counts a loop's body once; here it counts as often as it runs. Of a
  conditional the most expensive branch counts.

  Args:
    function: jitted or not.
    *args: arrays or `jax.ShapeDtypeStruct`s.
    trips: how often loops run whose trip count depends on data, by a `jax.named_scope` around them.
      Of the given names, the innermost one around a loop is its own.

  Raises:
    ValueError: a loop with matmuls in it has neither a known trip count nor an entry in `trips`; or
      a matmul is a library's custom call that does not tell its shape.
  """
  compiled = (function if hasattr(function, "lower") else jax.jit(function)).lower(*args).compile()
  return hlo_matmul_flops(compiled.as_text(), trips)


def hlo_matmul_flops(text: str, trips: Mapping[str, int | float] | None = None) -> float:
  """Returns the same number as `matmul_flops` for a module in HLO text form."""
  return _Count(parse(text), trips or {}).of_entry()


class _Count:
  """FLOPs of computations, each counted once."""

  def __init__(self, module: Module, trips: Mapping[str, int | float]):
    self._module, self._trips = module, trips
    self._flops: dict[str, float] = {}

  def of_entry(self) -> float:
    """Returns the FLOPs of one run of the program."""
    return self._of(self._module.entry)

  def _of(self, name: str) -> float:
    if name not in self._flops:
      computation = self._module[name]
      self._flops[name] = sum(
        (self._of_instruction(computation, each) for each in computation), 0.0
      )
    return self._flops[name]

  def _of_instruction(self, computation: Computation, instruction: Instruction) -> float:
    if matmuls.is_unknown_gemm(instruction):
      raise ValueError(f"the FLOPs of this custom call cannot be counted: {instruction.tail[:120]}")
    inside = [self._of(name) for _, name in instruction.called]
    if instruction.opcode == "while":
      return sum(inside) * self._trip_count(instruction) if sum(inside) else 0.0
    if instruction.opcode == "conditional":
      return max(inside, default=0.0)
    return matmuls.flops(computation, instruction) + sum(inside, 0.0)

  def _trip_count(self, loop: Instruction) -> float:
    known = trip_count(self._module, loop)
    if known is not None:
      return float(known)
    scopes = re.findall(r"[\w.\-]+", op_name(loop))  # of "jit(f)/transpose(jvp(scope))/while"
    for scope in reversed(scopes):
      if scope in self._trips:
        return float(self._trips[scope])
    raise ValueError(
      f"a loop with matmuls runs as often as data say: give trips for one of {scopes}"
    )
