"""How often a while loop runs: what the compiler noted, else read from its counter. TPU programs
carry no note."""

from __future__ import annotations

import operator

from moe_jax.hlo.instruction import Instruction
from moe_jax.hlo.module import Module

_SAME = {
  "copy",
  "bitcast",
  "convert",
  "reshape",
  "opt-barrier",
  "optimization-barrier",
  "copy-start",
  "copy-done",
}
_FLIPPED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "EQ": "EQ", "NE": "NE"}
_HOLDS = {name: getattr(operator, name.lower()) for name in _FLIPPED}
_DEPTH = 64  # of the chains that are followed
_Source = tuple[Instruction, int | None]  # an instruction, and which element of its tuple


def trip_count(module: Module, loop: Instruction) -> int | None:
  """Iterations of a while loop; None where they depend on data or the counter is not understood.

  Understood is a counter in the loop's tuple that the body moves by a constant and the condition
  compares with one. Constants may have passed through tuples of this and of outer loops, copies,
  fusions and sums.
  """
  if known := loop.find(r'"known_trip_count":\{"n":"(\d+)"'):
    return int(known[1])
  called = dict(loop.called)
  compare, _ = _source(
    module, module[called["condition"]].instructions[module[called["condition"]].root]
  )
  if compare.opcode != "compare" or not (direction := compare.find(r"direction=([A-Z]{2})")):
    return None
  sides = [_source(module, module[compare.home].operand(compare, i)) for i in (0, 1)]
  for (side, other), sense in zip(
    (sides, sides[::-1]), (direction[1], _FLIPPED[direction[1]]), strict=True
  ):
    counter, element = side
    if counter.opcode != "parameter" or counter.home != called["condition"] or element is None:
      continue
    start, limit = _value(module, module[loop.home].operand(loop), element), _value(module, *other)
    body = module[called["body"]]
    step = _moved(module, called["body"], element, body.instructions[body.root], element)
    if None not in (start, limit, step) and step:
      return _trips(start, limit, step, sense)
  return None


def _trips(start: int, limit: int, step: int, sense: str) -> int | None:
  """Iterations of `i = start; while i <sense> limit: i += step`; None if it does not end."""
  if not _HOLDS[sense](start, limit):
    return 0
  distance = limit - start
  if sense == "NE":
    return distance // step if distance % step == 0 and distance // step > 0 else None
  if sense == "EQ" or (step > 0) != (sense in ("LT", "LE")):
    return None
  return distance // step + 1 if sense in ("LE", "GE") else -(-distance // step)


def _source(module: Module, at: Instruction, element: int | None = None) -> _Source:
  """Where a value comes from, unchanged: through copies, tuples, fusions, and loops that only carry
  it."""
  for _ in range(_DEPTH):
    home = module[at.home]
    if at.opcode in _SAME:
      at = home.operand(at)
    elif (
      at.opcode == "get-tuple-element" and element is None and (index := at.find(r"index=(\d+)"))
    ):
      at, element = home.operand(at), int(index[1])
    elif at.opcode == "tuple" and element is not None:
      at, element = home.operand(at, element), None
    elif at.opcode == "fusion":
      inner = module[at.called[0][1]]
      at = inner.instructions[inner.root]
    elif (
      at.opcode == "while"
      and element is not None
      and _carried(module, dict(at.called)["body"], element)
    ):
      at = home.operand(at)
    elif (
      at.opcode == "parameter"
      and (caller := _only_caller(module, at.home))
      and caller.opcode == "fusion"
    ):
      at = module[caller.home].operand(caller, int(at.tail.split(")")[0]))
    else:
      break
  return at, element


def _only_caller(module: Module, name: str) -> Instruction | None:
  callers = module.callers[name]
  return callers[0] if len(callers) == 1 else None


def _carried(module: Module, body: str, element: int) -> bool:
  """Whether each iteration hands that element on as it got it."""
  at, same = _source(module, module[body].instructions[module[body].root], element)
  return at.opcode == "parameter" and at.home == body and same == element


def _value(
  module: Module, at: Instruction, element: int | None = None, depth: int = _DEPTH
) -> int | None:
  """The integer that is always there, or None."""
  at, element = _source(module, at, element)
  if at.opcode == "constant":
    literal = at.tail.split(")")[0]
    return int(literal) if literal.lstrip("-").isdigit() else None
  caller = _only_caller(module, at.home) if at.opcode == "parameter" else None
  if not depth:
    return None
  if caller and caller.opcode == "while" and element is not None:
    body = dict(caller.called)["body"]
    return (
      _value(module, module[caller.home].operand(caller), element, depth - 1)
      if _carried(module, body, element)
      else None
    )
  if caller and caller.opcode == "call":
    return _value(
      module, module[caller.home].operand(caller, int(at.tail.split(")")[0])), element, depth - 1
    )
  if at.opcode in ("add", "subtract", "multiply"):
    a, b = (_value(module, module[at.home].operand(at, i), None, depth - 1) for i in (0, 1))
    if a is not None and b is not None:
      return a + b if at.opcode == "add" else a - b if at.opcode == "subtract" else a * b
  return None


def _moved(
  module: Module, body: str, counter: int, at: Instruction, element: int | None
) -> int | None:
  """`at` minus the counter as the body got it, or None if that is not constant."""
  at, element = _source(module, at, element)
  if at.opcode == "parameter" and at.home == body and element == counter:
    return 0
  if at.opcode not in ("add", "subtract"):
    return None
  a, b = (module[at.home].operand(at, i) for i in (0, 1))
  moved, by = _moved(module, body, counter, a, None), _value(module, b)
  if at.opcode == "add" and (moved is None or by is None):
    moved, by = _moved(module, body, counter, b, None), _value(module, a)
  if moved is None or by is None:
    return None
  return moved + by if at.opcode == "add" else moved - by
