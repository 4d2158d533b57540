"""Tests that HLO text is parsed, and that malformed text raises an error that names the line."""

import pytest

from moe_jax.hlo.module import parse

pytestmark = pytest.mark.unit

TEXT = """\
// a comment, and tables of source lines, stand outside computations
HloModule jit_f, is_scheduled=true, num_partitions=8, frontend_attributes={a="1"}

FileNames
1 "file.py"

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}, execution_thread="other"

%body (p: (s32[], f32[4,2])) -> (s32[], f32[4,2]) {
  ROOT %p = (s32[]{:T(128)}, f32[4,2]{1,0:T(2,128)S(1)}) parameter(0)
}

ENTRY %main.1_spmd (a: f32[4,2]) -> f32[4,2] {
  %a = f32[4,2]{1,0:T(2,128)} parameter(0), metadata={op_name="a(b)"}
  %zero = s32[]{:T(128)} constant(0)
  %t = (s32[]{:T(128)}, /*index=1*/f32[4,2]{1,0:T(2,128)S(1)}) tuple(%zero, /*index=1*/%a)
  %loop-1 = (s32[]{:T(128)}, f32[4,2]{1,0:T(2,128)S(1)}) while(%t), condition=%add, body=%body
  ROOT %r = f32[4,2]{1,0} all-reduce(f32[4,2]{1,0:T(2,128)} %a), replica_groups={}, to_apply=%add
}
"""


def test_computations_and_instructions():
  # Catches a forgotten root or entry, tuples or typed operands that are cut at the wrong
  # parenthesis, and the scalar function of a reduction that is taken for a computation that runs.
  module = parse(TEXT)
  assert list(module.computations) == ["add", "body", "main.1_spmd"]
  assert (module.entry, module.partitions) == ("main.1_spmd", 8)
  main = module[module.entry]
  assert [i.opcode for i in main] == ["parameter", "constant", "tuple", "while", "all-reduce"]
  assert (
    main.root == "r"
    and main.instructions["r"].operands == ("a",)
    and main.instructions["r"].called == ()
  )
  assert (
    main.instructions["t"].operands == ("zero", "a") and main.instructions["zero"].operands == ()
  )
  assert [(s.dims, s.space) for s in main.instructions["loop-1"].shapes] == [((), 0), ((4, 2), 1)]
  assert dict(main.instructions["loop-1"].called) == {"condition": "add", "body": "body"}
  assert main.instructions["r"].line == 22
  assert [i.name for i in module.callers["body"]] == ["loop-1"] and not module.callers[module.entry]
  assert [i.name for i in main.users["a"]] == ["t", "r"] and module["add"].parameters == {
    0: "x",
    1: "y",
  }


@pytest.mark.parametrize(
  "old, new, words",
  [
    ("tuple(%zero, /*index=1*/%a)", "tuple", ["line 20", "not an instruction"]),
    ("body=%body", "body=%nobody", ["line 21", "%nobody"]),
    (", body=%body", "", ["line 21", "body"]),
    ("ROOT %r", "%r", ["line 17", "%main.1_spmd", "ROOT"]),
    ("to_apply=%add\n}", "to_apply=%add\n", ["line 17", "not closed"]),
    ("ENTRY ", "", ["ENTRY"]),
    (TEXT, "", ["ENTRY"]),
  ],
)
def test_malformed_text(old, new, words):
  # Catches text that is skipped in silence, and errors that do not name the line.
  with pytest.raises(ValueError) as error:
    parse(TEXT.replace(old, new))
  for word in words:
    assert word in str(error.value)


def test_operands_that_are_not_there():
  # Catches a bare KeyError that is raised far from the wrong line.
  main = parse(TEXT.replace("tuple(%zero", "tuple(%none"))["main.1_spmd"]
  with pytest.raises(ValueError, match="line 20.*%none is not defined"):
    main.operand(main.instructions["t"], 0)
  with pytest.raises(ValueError, match="line 20.*no operand 2"):
    main.operand(main.instructions["t"], 2)


def test_the_metadata_of_a_kernel_are_part_of_it():
  # Pallas kernels for TPUs, and what reads their results, have JSON on lines of its own. Catches
  # such a line that is taken for no instruction, one that is taken for the end of a computation,
  # and attributes after it that are lost.
  kernel = """  %k = f32[4,2] custom-call(%a), frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="after"}
"""
  text = TEXT.replace("  %zero =", f"{kernel}  %zero =")
  main = parse(text).computations["main.1_spmd"]
  assert main.instructions["k"].operands == ("a",)
  assert main.instructions["k"].find('op_name="after"')
  assert list(main.instructions) == ["a", "k", "zero", "t", "loop-1", "r"]
