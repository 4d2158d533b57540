"""Bounds the bytes that an instruction moves between the device and its main memory from above.

Nothing is assumed to stay in a cache.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from moe_jax.hlo.instruction import Instruction
from moe_jax.hlo.module import Computation, Module

# These move no data themselves. The computations that control flow runs are counted separately.
_FREE = {
  "parameter",
  "constant",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "while",
  "conditional",
  "call",
  "after-all",
  "partition-id",
  "replica-id",
  "opt-barrier",
  "optimization-barrier",
  "add-dependency",
  "domain",
}
_NO_WORK = ('custom_call_target="AllocateBuffer"', 'custom_call_target="ConcatBitcast"')
# These read only as much of operand 0 as they return.
_SLICES = {"dynamic-slice", "slice", "gather", "slice-start"}
# An entry of output_to_operand_aliasing, which has the form {output}: (operand, {}).
_ALIAS = re.compile(r"\{(\d*)\}: \((\d+), \{\}")
# These change operand 0 in place. The value is the number of the operand that is written into it.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}


def traffic(module: Module, instruction: Instruction) -> int:
  """Returns the bytes that one execution of an instruction outside fusions reads and writes.

  Arrays in on-chip memory are free. If an array is only sliced or updated in place, the slice
  counts instead of the array. An asynchronous pair reads at its start and writes at its end.

  Args:
    module: The module that contains the instruction.
    instruction: An instruction that is not inside a fusion.

  Raises:
    ValueError: If an operand or a parameter of a fused computation is not defined.
  """
  if instruction.opcode in _FREE or any(name in instruction.tail for name in _NO_WORK):
    return 0
  home = module[instruction.home]
  read = written = 0
  if not instruction.opcode.endswith("-done"):
    for i in range(len(instruction.operands)):
      if any(not shape.space for shape in home.operand(instruction, i).shapes):
        read += _read(module, home, instruction, i)
  if not instruction.opcode.endswith("-start") and instruction.opcode not in ("send", "recv"):
    written = _written(module, home, instruction)
  return read + written


def _main_memory_bytes(instruction: Instruction) -> int:
  """Returns the bytes of an instruction's result that lie in main memory."""
  return sum(shape.bytes for shape in instruction.shapes if not shape.space)


def _read(module: Module, home: Computation, user: Instruction, i: int) -> int:
  """Returns the bytes that `user` reads of its operand `i`, which is in main memory."""
  operand = home.operand(user, i)
  if user.opcode in _SLICES and not i:
    # The result of slice-start is the tuple (operands, result, ...).
    return user.shapes[len(user.operands) if user.opcode == "slice-start" else 0].bytes
  if user.opcode in _UPDATES and not i:
    # A scatter combines its update with the old values. A dynamic-update-slice overwrites them.
    return (
      home.operand(user, _UPDATES[user.opcode]).shapes[0].bytes if user.opcode == "scatter" else 0
    )
  if user.opcode == "fusion":
    inner = module[user.called[0][1]]
    if str(i) in _in_transit(user, inner)[1]:
      return 0
    if i not in inner.parameters:
      raise user.error(f"%{inner.name} has no parameter {i}")
    return min(_main_memory_bytes(operand), _read_inside(module, inner, inner.parameters[i]))
  return _main_memory_bytes(operand)


def _read_inside(module: Module, fused: Computation, name: str) -> int:
  """Returns the bytes that a fused computation reads of one of its values."""
  # A value that is also the fusion's result counts in full, as it is handed on to a reader.
  total = _main_memory_bytes(fused.instructions[name]) if name == fused.root else 0
  for user in fused.users[name]:
    if user.opcode == "bitcast":
      total += _read_inside(module, fused, user.name)
    else:
      total += sum(
        _read(module, fused, user, i) for i, operand in enumerate(user.operands) if operand == name
      )
  return total


def _written(module: Module, home: Computation, instruction: Instruction) -> int:
  """Returns the bytes that are written: those of the result, or of an update in place."""
  full = _main_memory_bytes(instruction)
  if not full:
    return 0
  if instruction.opcode in _UPDATES:
    return min(full, home.operand(instruction, _UPDATES[instruction.opcode]).shapes[0].bytes)
  if instruction.opcode == "bitcast":
    return min(full, _written(module, home, home.operand(instruction)))
  if instruction.opcode == "fusion":
    inner = module[instruction.called[0][1]]
    if handed_on := _in_transit(instruction, inner)[0]:
      # An empty output index stands for the whole result.
      return (
        0
        if "" in handed_on
        else sum(
          shape.bytes
          for i, shape in enumerate(instruction.shapes)
          if str(i) not in handed_on and not shape.space
        )
      )
    root = inner.instructions[inner.root]
    parts = (
      [inner.operand(root, i) for i in range(len(root.operands))]
      if root.opcode == "tuple"
      else [root]
    )
    return min(full, sum(_written(module, inner, part) for part in parts))
  return full


def _in_transit(fusion: Instruction, inner: Computation) -> tuple[Collection[str], Collection[str]]:
  """Returns the outputs and operands of a fusion that are buffers of a collective in progress.

  The fusion runs while the collective goes on, and only hands these buffers on.
  """
  if "output_to_operand_aliasing=" not in fusion.tail or not any(
    "chain_id=" in i.tail for i in inner
  ):
    return (), ()
  outputs, operands = zip(*_ALIAS.findall(fusion.tail), strict=True)
  return outputs, operands
