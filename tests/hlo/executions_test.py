"""Tests how often computations run in loops, calls, branches and inside one operation."""

import pathlib

import pytest

from moe_jax.hlo.executions import executions
from moe_jax.hlo.module import parse

pytestmark = pytest.mark.unit
SNIPPETS = pathlib.Path(__file__).parent / "snippets"

TEXT = """\
HloModule m

%leaf (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8] parameter(0)
  ROOT %d = f32[8,8] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%twice (y: f32[8,8]) -> f32[8,8] {
  %y = f32[8,8] parameter(0)
  %one = f32[8,8] call(%y), to_apply=%leaf
  ROOT %two = f32[8,8] call(%one), to_apply=%leaf
}

%idle (z: f32[8,8]) -> f32[8,8] {
  ROOT %z = f32[8,8] parameter(0)
}

%go (g: f32[8,8]) -> pred[] {
  %g = f32[8,8] parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (a: f32[8,8], i: s32[]) -> f32[8,8] {
  %a = f32[8,8] parameter(0)
  %i = s32[] parameter(1)
  %w = f32[8,8] while(%a), condition=%go, body=%twice, backend_config={"known_trip_count":{"n":"5"}}
  %b = f32[8,8] conditional(%i, %w, %w, %w), branch_computations={%idle, %leaf, %idle}
  %start = ((f32[8,8]), f32[8,8], u32[]) async-start(%b), calls=%wrapped, metadata={op_name="named"}
  ROOT %done = f32[8,8] async-done(%start), calls=%wrapped
}

%wrapped (v: f32[8,8]) -> f32[8,8] {
  %v = f32[8,8] parameter(0)
  ROOT %f = f32[8,8] fusion(%v), kind=kLoop, calls=%inside
}

%inside (u: f32[8,8]) -> f32[8,8] {
  ROOT %u = f32[8,8] parameter(0)
}
"""


def test_times():
  # Catches executions of callees that are added instead of multiplied, a computation that is called
  # twice but counted once, an asynchronous pair of which both ends are counted, branches that are
  # summed, and reliance on the order in the text.
  runs, unknown = executions(parse(TEXT))
  assert unknown == 0
  assert {name: (run.times, run.once) for name, run in runs.items()} == {
    "main": (1, 1),
    "twice": (5, 1),
    "go": (5, 1),
    "leaf": (11, 3),
    "wrapped": (1, 1),
    "inside": (1, 1),
  }
  assert {name for name, run in runs.items() if run.fused} == {"wrapped", "inside"}
  assert runs["inside"].op_name == "named" and runs["leaf"].op_name == ""


def test_unknown_loops_count_once():
  # Catches a loop until a value is reached that is dropped, or that is not reported as unknown.
  runs, unknown = executions(parse((SNIPPETS / "v5p_until.hlo").read_text()))
  assert unknown == 1 and {run.times for run in runs.values()} == {1.0}


def test_the_costliest_branch():
  # Catches that the last branch is taken, or all of them. Branch 0 has one product, branch 1 has
  # two and branch 2 has none.
  module = parse((SNIPPETS / "v5p_branches.hlo").read_text())
  runs, _ = executions(module)
  [branches] = [
    dict(i.called) and [n for _, n in i.called]
    for c in module.computations.values()
    for i in c
    if i.opcode == "conditional"
  ]
  assert [name in runs for name in branches] == [False, True, False]
