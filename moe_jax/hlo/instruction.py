"""Represents one line of HLO text as an instruction, whose details are parsed when needed."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import NamedTuple

_SHAPE = re.compile(r"(\w+)\[([^\]]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
  r"(calls|to_apply|condition|body|true_computation|false_computation|branch_computations|"
  r"called_computations)=(?:%([\w.\-]+)|\{([^}]*)\})"
)
# Other instructions, such as reduce or sort, apply the computation that they name to scalars.
_CALLERS = {"fusion", "while", "conditional", "call", "async-start", "custom-call"}


class Shape(NamedTuple):
  """The type and size of one array.

  For example, "bf16[4,8]{1,0:T(8,128)(2,1)S(1)}" is Shape("bf16", (4, 8), 1).

  Attributes:
    dtype: The element type as HLO writes it.
    dims: The size of each dimension.
    space: The memory space. 0 is the device's main memory.
  """

  dtype: str
  dims: tuple[int, ...]
  space: int = 0

  @property
  def bytes(self) -> int:
    """The size in bytes without the padding of tiles; tokens have none."""
    # The width in bits is the number in the dtype: 16 in "bf16". "pred" has a byte an element.
    bits = re.search(r"\d+", self.dtype)
    width = int(bits[0]) if bits else 8 if self.dtype == "pred" else 0
    return (math.prod(self.dims) * width + 7) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction of a module.

  Attributes:
    name: The name without the percent sign.
    result: The text of the result's type, which may be a tuple.
    opcode: The operation, such as "dot".
    tail: The text after "opcode(": operands, attributes, metadata and backend_config.
    line: The line number in the module's text, counted from 1.
    home: The name of the computation that contains the instruction.
  """

  name: str
  result: str
  opcode: str
  tail: str
  line: int
  home: str

  @functools.cached_property
  def shapes(self) -> tuple[Shape, ...]:
    """The arrays of the result, with tuples flattened."""
    return tuple(
      Shape(
        dtype,
        tuple(int(n) for n in re.findall(r"\d+", dims)),
        int(s[1]) if (s := _SPACE.search(layout)) else 0,
      )
      for dtype, dims, layout in _SHAPE.findall(self.result)
    )

  @functools.cached_property
  def operands(self) -> tuple[str, ...]:
    """The names of the instructions whose results this one takes."""
    end = _closing(self.tail) if self.opcode not in ("constant", "parameter") else 0
    return tuple(_OPERAND.findall(self.tail, 0, end))

  @functools.cached_property
  def called(self) -> tuple[tuple[str, str], ...]:
    """Pairs of role and computation for what it runs, such as ("body", "region_1").

    The scalar functions that reductions and the like apply are left out.
    """
    if self.opcode not in _CALLERS:
      return ()
    return tuple(
      (role, name)
      for role, one, several in _CALLED.findall(self.tail)
      for name in ([one] if one else _OPERAND.findall(several))
    )

  def find(self, pattern: str | re.Pattern) -> re.Match | None:
    """Returns the first match of a regular expression in `tail`, or None."""
    return re.search(pattern, self.tail)

  def error(self, problem: str) -> ValueError:
    """Returns a ValueError that names the problem, the line and the instruction."""
    text = f"%{self.name} = {self.result} {self.opcode}({self.tail}"
    return ValueError(f"HLO line {self.line}: {problem}: {text[:120]}")


def _closing(tail: str) -> int:
  """Returns the index at which the parenthesis closes that was opened just before `tail`."""
  end = tail.find(")")
  if "(" not in tail[:end]:
    return end
  depth = 1
  for parenthesis in re.finditer(r"[()]", tail):
    depth += 1 if parenthesis[0] == "(" else -1
    if not depth:
      return parenthesis.start()
  return len(tail)
