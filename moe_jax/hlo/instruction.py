"""One line of HLO text: an instruction and the shapes of its result. Details are parsed when asked
for."""

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
_CALLERS = {
  "fusion",
  "while",
  "conditional",
  "call",
  "async-start",
  "custom-call",
}  # others apply theirs to scalars


class Shape(NamedTuple):
  """An array: "bf16[4,8]{1,0:T(8,128)(2,1)S(1)}" is Shape("bf16", (4, 8), 1). Space 0 is the
  device's main memory."""

  dtype: str
  dims: tuple[int, ...]
  space: int = 0

  @property
  def bytes(self) -> int:
    """Without the padding of tiles. Tokens have none."""
    bits = re.search(r"\d+", self.dtype)
    width = int(bits[0]) if bits else 8 if self.dtype == "pred" else 0
    return (math.prod(self.dims) * width + 7) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line, the `line`th from 1. `tail` is what follows "opcode(": operands, attributes,
  metadata, backend_config."""

  name: str
  result: str
  opcode: str
  tail: str
  line: int
  home: str  # the computation that it is in

  @functools.cached_property
  def shapes(self) -> tuple[Shape, ...]:
    """The arrays of the result, tuples flattened."""
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
    end = _closing(self.tail) if self.opcode not in ("constant", "parameter") else 0
    return tuple(_OPERAND.findall(self.tail, 0, end))

  @functools.cached_property
  def called(self) -> tuple[tuple[str, str], ...]:
    """(role, computation) for what it runs, such as ("body", "region_1"); not the scalar functions
    of reductions."""
    if self.opcode not in _CALLERS:
      return ()
    return tuple(
      (role, name)
      for role, one, several in _CALLED.findall(self.tail)
      for name in ([one] if one else _OPERAND.findall(several))
    )

  def find(self, pattern: str | re.Pattern) -> re.Match | None:
    return re.search(pattern, self.tail)

  def error(self, problem: str) -> ValueError:
    text = f"%{self.name} = {self.result} {self.opcode}({self.tail}"
    return ValueError(f"HLO line {self.line}: {problem}: {text[:120]}")


def _closing(tail: str) -> int:
  """Where the parenthesis closes that was open before `tail`."""
  end = tail.find(")")
  if "(" not in tail[:end]:
    return end
  depth = 1
  for at in re.finditer(r"[()]", tail):
    depth += 1 if at[0] == "(" else -1
    if not depth:
      return at.start()
  return len(tail)
