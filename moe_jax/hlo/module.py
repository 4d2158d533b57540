"""Parses HLO text into a module of computations, in one pass over its lines."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator

from moe_jax.hlo.instruction import Instruction

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (\S.*?) ([a-z][\w\-]*)\((.*)$")
# The roles that an instruction has to name a computation for, by opcode.
_NEEDS = {"fusion": {"calls"}, "while": {"body", "condition"}}


@dataclasses.dataclass
class Computation:
  """A computation of a module. Iterating over it yields its instructions in the text's order.

  Attributes:
    name: The name without the percent sign.
    line: The number of the line on which it begins, counted from 1.
    instructions: Instruction name to instruction.
    root: The name of the instruction whose result the computation returns.
  """

  name: str
  line: int
  instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)
  root: str = ""

  def __iter__(self) -> Iterator[Instruction]:
    return iter(self.instructions.values())

  def operand(self, instruction: Instruction, i: int = 0) -> Instruction:
    """Returns the instruction whose result is operand `i` of `instruction`.

    Raises:
      ValueError: If `instruction` has fewer operands, or if the operand is not defined in this
        computation.
    """
    if i >= len(instruction.operands):
      raise instruction.error(f"it has no operand {i}")
    if instruction.operands[i] not in self.instructions:
      raise instruction.error(f"operand %{instruction.operands[i]} is not defined in %{self.name}")
    return self.instructions[instruction.operands[i]]

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    """The instructions that take each result as an operand, by the result's name."""
    users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
    for instruction in self:
      # An instruction that takes a result twice is listed once.
      for name in dict.fromkeys(instruction.operands):
        users.setdefault(name, []).append(instruction)
    return users

  @functools.cached_property
  def parameters(self) -> dict[int, str]:
    """The names of the parameters, by their number."""
    return {int(i.tail.split(")")[0]): i.name for i in self if i.opcode == "parameter"}


@dataclasses.dataclass
class Module:
  """A parsed module. `module[name]` is one of its computations.

  Attributes:
    computations: Computation name to computation.
    entry: The name of the computation with which the program starts.
    partitions: The number of devices that an SPMD program runs on.
  """

  computations: dict[str, Computation]
  entry: str
  partitions: int

  def __getitem__(self, name: str) -> Computation:
    return self.computations[name]

  @functools.cached_property
  def callers(self) -> dict[str, list[Instruction]]:
    """The instructions that run each computation, by its name."""
    callers: dict[str, list[Instruction]] = {name: [] for name in self.computations}
    for computation in self.computations.values():
      for instruction in computation:
        for _, name in instruction.called:
          callers[name].append(instruction)
    return callers


def parse(text: str) -> Module:
  """Parses the text that `compiled.as_text()` returns.

  Raises:
    ValueError: If a line inside a computation is not an instruction, if a computation is not closed
      or has no root, if an instruction runs a computation that is missing or does not name one that
      it needs, or if there is no ENTRY. The message names the line where there is one.
  """
  computations: dict[str, Computation] = {}
  current, entry = None, None
  name, in_metadata = "", False
  for number, line in enumerate(text.splitlines(), 1):
    if current is None:
      if header := _HEADER.match(line):
        current = computations[header[2]] = Computation(header[2], number)
        entry = header[2] if header[1] else entry
    elif name and (in_metadata or line.startswith('"')):
      # The metadata of a Pallas kernel are JSON, which has lines of its own and one after it.
      in_metadata = line.startswith('"')
      kernel = current.instructions[name]
      current.instructions[name] = dataclasses.replace(kernel, tail=kernel.tail + line)
    elif line.startswith("}"):
      if not current.root:
        raise ValueError(f"HLO line {current.line}: computation %{current.name} has no ROOT")
      current, name = None, ""
    elif match := _INSTRUCTION.match(line):
      root, name, result, opcode, tail = match.groups()
      current.instructions[name] = Instruction(name, result, opcode, tail, number, current.name)
      current.root = name if root else current.root
    elif line.strip():
      raise ValueError(f"HLO line {number}: not an instruction: {line.strip()[:120]}")
  if current is not None:
    raise ValueError(f"HLO line {current.line}: computation %{current.name} is not closed")
  if entry is None:
    raise ValueError("the HLO text has no ENTRY computation")
  _check_calls(computations)
  partitions = re.search(r"^HloModule.*\bnum_partitions=(\d+)", text, re.MULTILINE)
  return Module(computations, entry, int(partitions[1]) if partitions else 1)


def _check_calls(computations: dict[str, Computation]) -> None:
  """Raises ValueError if an instruction's computations are not named or do not exist."""
  for computation in computations.values():
    for instruction in computation:
      if missing := _NEEDS.get(instruction.opcode, set()) - {
        role for role, _ in instruction.called
      }:
        raise instruction.error(f"it does not name its {' and '.join(sorted(missing))}")
      for _, name in instruction.called:
        if name not in computations:
          raise instruction.error(f"there is no computation %{name}")
