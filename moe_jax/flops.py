"""How many FLOPs the matmuls of a compiled program do: what XLA makes of it, not what was written."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\([^\n]*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_DOT = re.compile(r"\w+\[([\d,]*)\]\S* dot\((?:\w+\[[\d,]*\]\S* )?%?([\w.\-]+),")
_CALLED = re.compile(r"(?:calls|to_apply|condition|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_GEMM_CALL = re.compile(r'custom_call_target="([^"]*(?:gemm|matmul)[^"]*)"', re.IGNORECASE)
_NAME = re.compile(r'op_name="([^"]*)"')


def matmul_flops(function: Callable, *args: Any, trips: Mapping[str, int | float] | None = None) -> float:
  """FLOPs (2 a multiply-add) of all matmuls that a call of `function` executes, by the optimised HLO.

  `compiled.cost_analysis()` counts a loop's body once; here it counts as often as it runs. Of a conditional the most
  expensive branch counts.

  Args:
    function: jitted or not.
    *args: arrays or `jax.ShapeDtypeStruct`s.
    trips: how often loops run whose trip count depends on data, by a `jax.named_scope` around them. Of the given names,
      the innermost one around a loop is its own.

  Raises:
    ValueError: a loop with matmuls in it has neither a known trip count nor an entry in `trips`; or a matmul is a
      library's custom call (GPU), which says nothing of its shape.
  """
  compiled = (function if hasattr(function, "lower") else jax.jit(function)).lower(*args).compile()
  return hlo_matmul_flops(compiled.as_text(), trips)


def hlo_matmul_flops(text: str, trips: Mapping[str, int | float] | None = None) -> float:
  """As `matmul_flops`, of a module in HLO text form."""
  computations, entry = _parse(text)
  known = {}

  def flops(name: str) -> float:
    if name not in known:
      shapes = {result: _shape(line) for result, line in computations[name]}
      known[name] = sum((of_instruction(line, shapes) for _, line in computations[name]), 0.0)
    return known[name]

  def of_instruction(line: str, shapes: Mapping[str, list[int]]) -> float:
    if dot := _DOT.match(line):
      return _dot_flops(line, dot, shapes)
    if custom := _GEMM_CALL.search(line):
      raise ValueError(f"cannot count the FLOPs of custom call {custom[1]!r}")
    inside = [flops(name) for name in _CALLED.findall(line)]
    if " while(" in line and sum(inside):
      return sum(inside) * _trip_count(line, trips or {})
    branches = _BRANCHES.search(line)
    choices = [flops(name.strip().lstrip("%")) for name in branches[1].split(",")] if branches else []
    return max(inside + choices, default=0.0) if " conditional(" in line else sum(inside, 0.0)

  return flops(entry)


def _parse(text):
  """The instructions of each computation as (name, definition), and the entry computation's name."""
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      current = computations.setdefault(header[1], [])
      entry = header[1] if line.startswith("ENTRY") else entry
    elif current is not None and (instruction := _INSTRUCTION.match(line)):
      current.append(instruction.groups())
  if entry is None:
    raise ValueError("no ENTRY computation in this HLO")
  return computations, entry


def _shape(definition: str) -> list[int]:
  dims = re.match(r"\w+\[([\d,]*)\]", definition)
  return [int(d) for d in dims[1].split(",") if d] if dims else []


def _dot_flops(line: str, dot: re.Match, shapes: Mapping[str, list[int]]) -> float:
  lhs = shapes[dot[2]]
  contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line)
  depth = math.prod(lhs[int(d)] for d in contracted[1].split(",") if d) if contracted else 1
  return 2.0 * math.prod(_shape(line)) * depth


def _trip_count(line: str, trips: Mapping[str, int | float]) -> float:
  if known := _TRIPS.search(line):
    return float(known[1])
  name = _NAME.search(line)
  scopes = re.findall(r"[\w.\-]+", name[1]) if name else []  # "jit(f)/transpose(jvp(scope))/while"
  for scope in reversed(scopes):
    if scope in trips:
      return float(trips[scope])
  raise ValueError(f"a loop with matmuls runs as often as data say: give trips for one of {scopes}")
