"""Tests instructions: the shapes of their results, and the computations that they run."""

import pytest

from moe_jax.hlo.instruction import Instruction

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
  "result, shapes, size",
  [
    ("f32[]", [("f32", (), 0)], 4),
    ("bf16[4,256]{1,0:T(8,128)(2,1)S(3)}", [("bf16", (4, 256), 3)], 2048),
    ("pred[7]{0}", [("pred", (7,), 0)], 7),
    ("s4[3]{0:T(256)E(4)}", [("s4", (3,), 0)], 2),
    ("f8e4m3fn[2,3]", [("f8e4m3fn", (2, 3), 0)], 6),
    ("f4e2m1fn[8]", [("f4e2m1fn", (8,), 0)], 4),
    ("c64[2]", [("c64", (2,), 0)], 16),
    ("s32[<=8]{0}", [("s32", (8,), 0)], 32),
    (
      "(f32[0]{0}, token[], /*index=2*/u32[]{:S(2)})",
      [("f32", (0,), 0), ("token", (), 0), ("u32", (), 2)],
      4,
    ),
    (
      "((bf16[2]{0}), (bf16[4]{0}, s32[1]{0}))",
      [("bf16", (2,), 0), ("bf16", (4,), 0), ("s32", (1,), 0)],
      16,
    ),
  ],
)
def test_shapes(result, shapes, size):
  # Catches bits that are taken for bytes, tiles that are taken for dimensions, and the memory space
  # of one element of a tuple that is given to another.
  instruction = Instruction("x", result, "copy", "%a)", 1, "main")
  assert [tuple(shape) for shape in instruction.shapes] == shapes
  assert sum(shape.bytes for shape in instruction.shapes) == size


def test_several_computations():
  # Catches that the branches of a conditional in braces, or the computation of an asynchronous
  # start, are not found.
  conditional = Instruction(
    "x", "f32[]", "conditional", "%i, %a, %b), branch_computations={%one, %two}", 1, "main"
  )
  assert conditional.called == (("branch_computations", "one"), ("branch_computations", "two"))
  start = Instruction(
    "x", "f32[]", "async-start", '%a), async_execution_thread="t", calls=%inner', 1, "main"
  )
  done = Instruction("y", "f32[]", "async-done", "%x), calls=%inner", 2, "main")
  assert start.called == (("calls", "inner"),) and done.called == ()
