"""Counts the FLOPs of the matmuls in a compiled program, as XLA arranged them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax

from moe_jax.hlo import matmuls
from moe_jax.hlo.collectives import op_name
from moe_jax.hlo.instruction import Instruction
from moe_jax.hlo.loops import trip_count
from moe_jax.hlo.module import Computation, Module, parse


def matmul_flops(
  function: Callable, *args: Any, trips: Mapping[str, int | float] | None = None
) -> float:
  """Returns the FLOPs of all matmuls that one call of `function` executes.

  A multiply-add counts as 2 FLOPs. The matmuls are those of the optimised HLO, which may differ
  from those in the Python code. `compiled.cost_analysis()` counts the body of a loop once; this
  function counts it as often as it runs. Only the most expensive branch of a conditional counts.

  Args:
    function: A function that may already be jitted.
    *args: Arrays or `jax.ShapeDtypeStruct`s.
    trips: The number of iterations of loops whose trip count depends on data, by the name of a
      `jax.named_scope` around the loop. If several of the names enclose a loop, the innermost
      applies.

  Raises:
    ValueError: If a loop that contains matmuls has neither a known trip count nor an entry in
      `trips`, or if a matmul is a library's custom call that does not state its shape.
  """
  compiled = (function if hasattr(function, "lower") else jax.jit(function)).lower(*args).compile()
  # `as_text` returns None only on backends that have no HLO.
  return hlo_matmul_flops(cast(str, compiled.as_text()), trips)


def hlo_matmul_flops(text: str, trips: Mapping[str, int | float] | None = None) -> float:
  """Returns the FLOPs of all matmuls that a module executes, given as optimised HLO text.

  Args:
    text: The module, as `compiled.as_text()` returns it.
    trips: As for `matmul_flops`.

  Raises:
    ValueError: As for `matmul_flops`, or if the text is malformed.
  """
  return _FlopCounter(parse(text), trips or {}).entry_flops()


class _FlopCounter:
  """Counts the FLOPs of computations and caches them, so that each computation is read once."""

  def __init__(self, module: Module, trips: Mapping[str, int | float]):
    self._module, self._trips = module, trips
    self._flops: dict[str, float] = {}

  def entry_flops(self) -> float:
    """Returns the FLOPs of one run of the program."""
    return self._computation_flops(self._module.entry)

  def _computation_flops(self, name: str) -> float:
    if name not in self._flops:
      computation = self._module[name]
      self._flops[name] = sum(
        (self._instruction_flops(computation, each) for each in computation), 0.0
      )
    return self._flops[name]

  def _instruction_flops(self, computation: Computation, instruction: Instruction) -> float:
    if matmuls.is_unknown_gemm(instruction):
      raise ValueError(f"the FLOPs of this custom call cannot be counted: {instruction.tail[:120]}")
    inside = [self._computation_flops(name) for _, name in instruction.called]
    if instruction.opcode == "while":
      # The trip count of a loop without matmuls does not matter, so it need not be known.
      return sum(inside) * self._trip_count(instruction) if sum(inside) else 0.0
    if instruction.opcode == "conditional":
      return max(inside, default=0.0)
    return matmuls.flops(computation, instruction) + sum(inside, 0.0)

  def _trip_count(self, loop: Instruction) -> float:
    count = trip_count(self._module, loop)
    if count is not None:
      return float(count)
    # The op_name lists the enclosing scopes, as in "jit(f)/transpose(jvp(scope))/while".
    scopes = re.findall(r"[\w.\-]+", op_name(loop))
    for scope in reversed(scopes):
      if scope in self._trips:
        return float(self._trips[scope])
    raise ValueError(
      "the trip count of a loop with matmuls depends on data; pass `trips` with an entry for one "
      f"of its scopes: {scopes}"
    )
