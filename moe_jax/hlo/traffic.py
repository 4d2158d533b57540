"""Bytes between an instruction and the device's main memory, an upper bound: nothing is assumed to
stay in a cache."""

from __future__ import annotations

import re
from collections.abc import Collection

from moe_jax.hlo.instruction import Instruction
from moe_jax.hlo.module import Computation, Module

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
_SLICES = {"dynamic-slice", "slice", "gather", "slice-start"}  # read of operand 0 what they return
_ALIAS = re.compile(
  r"\{(\d*)\}: \((\d+), \{\}"
)  # of output_to_operand_aliasing: {output}: (operand, {})
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # change operand 0 in place, by this operand


def traffic(module: Module, instruction: Instruction) -> int:
  """Bytes read and written by one execution of an instruction outside fusions; arrays in on-chip
  memory are free.

  Of arrays that are only sliced or updated in place, the slice counts. An asynchronous pair reads
  at its start and writes at its end.
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


def _main(instruction: Instruction) -> int:
  return sum(shape.bytes for shape in instruction.shapes if not shape.space)


def _read(module: Module, home: Computation, user: Instruction, i: int) -> int:
  """What `user` reads of its operand `i`, which is in main memory."""
  operand = home.operand(user, i)
  if user.opcode in _SLICES and not i:
    return user.shapes[len(user.operands) if user.opcode == "slice-start" else 0].bytes
  if user.opcode in _UPDATES and not i:
    return (
      home.operand(user, _UPDATES[user.opcode]).shapes[0].bytes if user.opcode == "scatter" else 0
    )
  if user.opcode == "fusion":
    inner = module[user.called[0][1]]
    if str(i) in _in_transit(user, inner)[1]:
      return 0
    if i not in inner.parameters:
      raise user.error(f"%{inner.name} has no parameter {i}")
    return min(_main(operand), _inside(module, inner, inner.parameters[i]))
  return _main(operand)


def _inside(module: Module, fused: Computation, name: str) -> int:
  """What a fused computation reads of one of its values."""
  total = (
    _main(fused.instructions[name]) if name == fused.root else 0
  )  # handed on: whoever gets it reads it
  for user in fused.users[name]:
    if user.opcode == "bitcast":
      total += _inside(module, fused, user.name)
    else:
      total += sum(
        _read(module, fused, user, i) for i, operand in enumerate(user.operands) if operand == name
      )
  return total


def _written(module: Module, home: Computation, instruction: Instruction) -> int:
  """What is written of the result: of an update in place, the update."""
  full = _main(instruction)
  if not full:
    return 0
  if instruction.opcode in _UPDATES:
    return min(full, home.operand(instruction, _UPDATES[instruction.opcode]).shapes[0].bytes)
  if instruction.opcode == "bitcast":
    return min(full, _written(module, home, home.operand(instruction)))
  if instruction.opcode == "fusion":
    inner = module[instruction.called[0][1]]
    if handed_on := _in_transit(instruction, inner)[0]:
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
  """(outputs, operands) that are buffers of a collective which goes on meanwhile: fusions only hand
  them on."""
  if "output_to_operand_aliasing=" not in fusion.tail or not any(
    "chain_id=" in i.tail for i in inner
  ):
    return (), ()
  outputs, operands = zip(*_ALIAS.findall(fusion.tail), strict=True)
  return outputs, operands
