"""Finds how often a while loop runs, from the compiler's note or else from the loop's counter.

TPU programs carry no such note.
"""

from __future__ import annotations

import operator

from moe_jax.hlo.instruction import Instruction
from moe_jax.hlo.module import Module

# Operations whose result has the value of operand 0.
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
# The comparison with its two sides exchanged.
_FLIPPED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "EQ": "EQ", "NE": "NE"}
_HOLDS = {name: getattr(operator, name.lower()) for name in _FLIPPED}
_DEPTH = 64  # the longest chain of instructions that is followed
_Source = tuple[
  Instruction, int | None
]  # an instruction, and an element of its tuple if it has one


def trip_count(module: Module, loop: Instruction) -> int | None:
  """Returns the number of iterations of a while loop, or None if it cannot be derived.

  It cannot be derived if it depends on data or if the counter is not understood. A counter is
  understood if it is an element of the loop's tuple that the body changes by a constant and that
  the condition compares with a constant. The constants may have passed through the tuples of this
  loop and of outer loops, and through copies, fusions and sums.

  Args:
    module: The module that contains the loop.
    loop: An instruction whose opcode is "while".
  """
  if note := loop.find(r'"known_trip_count":\{"n":"(\d+)"'):
    return int(note[1])
  called = dict(loop.called)
  compare, _ = _source(
    module, module[called["condition"]].instructions[module[called["condition"]].root]
  )
  if compare.opcode != "compare" or not (direction := compare.find(r"direction=([A-Z]{2})")):
    return None
  sides = [_source(module, module[compare.home].operand(compare, i)) for i in (0, 1)]
  # The counter may be on either side of the comparison, so both are tried.
  for (side, other), sense in zip(
    (sides, sides[::-1]), (direction[1], _FLIPPED[direction[1]]), strict=True
  ):
    counter, element = side
    if counter.opcode != "parameter" or counter.home != called["condition"] or element is None:
      continue
    start, limit = _value(module, module[loop.home].operand(loop), element), _value(module, *other)
    body = module[called["body"]]
    step = _moved(module, called["body"], element, body.instructions[body.root], element)
    if start is not None and limit is not None and step:
      return _trips(start, limit, step, sense)
  return None


def _trips(start: int, limit: int, step: int, sense: str) -> int | None:
  """Returns the iterations of `i = start; while i <sense> limit: i += step`, or None if endless."""
  if not _HOLDS[sense](start, limit):
    return 0
  distance = limit - start
  if sense == "NE":
    # The counter has to hit the limit exactly.
    return distance // step if distance % step == 0 and distance // step > 0 else None
  if sense == "EQ" or (step > 0) != (sense in ("LT", "LE")):
    return None
  return distance // step + 1 if sense in ("LE", "GE") else -(-distance // step)


def _source(module: Module, value: Instruction, element: int | None = None) -> _Source:
  """Returns the instruction, and the element of its tuple, from which a value comes unchanged.

  The value is followed through copies, tuples, fusions, and loops that only carry it.

  Args:
    module: The module.
    value: The instruction whose result is followed.
    element: The element of the result that is followed. None means the whole result.
  """
  for _ in range(_DEPTH):
    home = module[value.home]
    if value.opcode in _SAME:
      value = home.operand(value)
    elif (
      value.opcode == "get-tuple-element"
      and element is None
      and (index := value.find(r"index=(\d+)"))
    ):
      value, element = home.operand(value), int(index[1])
    elif value.opcode == "tuple" and element is not None:
      value, element = home.operand(value, element), None
    elif value.opcode == "fusion":
      inner = module[value.called[0][1]]
      value = inner.instructions[inner.root]
    elif (
      value.opcode == "while"
      and element is not None
      and _carried(module, dict(value.called)["body"], element)
    ):
      value = home.operand(value)
    elif (
      value.opcode == "parameter"
      and (caller := _only_caller(module, value.home))
      and caller.opcode == "fusion"
    ):
      value = module[caller.home].operand(caller, int(value.tail.split(")")[0]))
    else:
      break
  return value, element


def _only_caller(module: Module, name: str) -> Instruction | None:
  """Returns the instruction that runs a computation, or None if there is not exactly one."""
  callers = module.callers[name]
  return callers[0] if len(callers) == 1 else None


def _carried(module: Module, body: str, element: int) -> bool:
  """Returns whether each iteration of a loop returns that element of its tuple unchanged."""
  value, same = _source(module, module[body].instructions[module[body].root], element)
  return value.opcode == "parameter" and value.home == body and same == element


def _value(
  module: Module, value: Instruction, element: int | None = None, depth: int = _DEPTH
) -> int | None:
  """Returns the integer that a result always has, or None if it is not a known constant.

  Args:
    module: The module.
    value: The instruction whose result is evaluated.
    element: The element of the result that is evaluated. None means the whole result.
    depth: The number of recursive calls that are still allowed.
  """
  value, element = _source(module, value, element)
  if value.opcode == "constant":
    literal = value.tail.split(")")[0]
    return int(literal) if literal.lstrip("-").isdigit() else None
  caller = _only_caller(module, value.home) if value.opcode == "parameter" else None
  if not depth:
    return None
  if caller and caller.opcode == "while" and element is not None:
    # An element that an outer loop only carries has the value that it had before that loop.
    body = dict(caller.called)["body"]
    return (
      _value(module, module[caller.home].operand(caller), element, depth - 1)
      if _carried(module, body, element)
      else None
    )
  if caller and caller.opcode == "call":
    return _value(
      module, module[caller.home].operand(caller, int(value.tail.split(")")[0])), element, depth - 1
    )
  if value.opcode in ("add", "subtract", "multiply"):
    a, b = (_value(module, module[value.home].operand(value, i), None, depth - 1) for i in (0, 1))
    if a is not None and b is not None:
      return a + b if value.opcode == "add" else a - b if value.opcode == "subtract" else a * b
  return None


def _moved(
  module: Module, body: str, counter: int, value: Instruction, element: int | None
) -> int | None:
  """Returns a value minus the counter at the start of the body, or None if that is not constant.

  Args:
    module: The module.
    body: The name of the loop's body.
    counter: The index of the counter in the loop's tuple.
    value: An instruction in the body, whose result is compared with the counter.
    element: The element of the result that is meant. None means the whole result.
  """
  value, element = _source(module, value, element)
  if value.opcode == "parameter" and value.home == body and element == counter:
    return 0
  if value.opcode not in ("add", "subtract"):
    return None
  a, b = (module[value.home].operand(value, i) for i in (0, 1))
  moved, by = _moved(module, body, counter, a, None), _value(module, b)
  # A sum may have the counter on its right side too.
  if value.opcode == "add" and (moved is None or by is None):
    moved, by = _moved(module, body, counter, b, None), _value(module, a)
  if moved is None or by is None:
    return None
  return moved + by if value.opcode == "add" else moved - by
