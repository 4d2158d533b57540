"""Tests trip counts, for all ways to count and for loops that compilers have printed."""

import pathlib

import pytest

from moe_jax.hlo.loops import trip_count
from moe_jax.hlo.module import parse

pytestmark = pytest.mark.unit
SNIPPETS = pathlib.Path(__file__).parent / "snippets"

# The counter is element 1 of the inner loop's tuple, and its bound is element 2. The outer loop
# carries the bound unchanged, too.
LOOPS = """\
HloModule m

%next (c: s32[]) -> s32[] {{
  %c = s32[] parameter(0)
  %step = s32[] constant({step})
  ROOT %n = s32[] {move}(%c, %step)
}}

%body (p: (f32[], s32[], s32[])) -> (f32[], s32[], s32[]) {{
  %p = (f32[], s32[], s32[]) parameter(0)
  %f = f32[] get-tuple-element(%p), index=0
  %i = s32[] get-tuple-element(%p), index=1
  %kept = s32[] get-tuple-element(%p), index={kept}
  %same = s32[] copy(%i)
  %moved = s32[] fusion(%same), kind=kLoop, calls=%next
  ROOT %t = (f32[], s32[], s32[]) tuple(%f, %moved, %kept)
}}

%compared (a: s32[], b: s32[]) -> pred[] {{
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %lt = pred[] compare(%a, %b), direction={direction}
}}

%condition (q: (f32[], s32[], s32[])) -> pred[] {{
  %q = (f32[], s32[], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=1
  %bound = s32[] get-tuple-element(%q), index=2
  ROOT %go = pred[] fusion({sides}), kind=kLoop, calls=%compared
}}

%outer (o: (f32[], s32[])) -> (f32[], s32[]) {{
  %o = (f32[], s32[]) parameter(0)
  %g = f32[] get-tuple-element(%o), index=0
  %limit = s32[] get-tuple-element(%o), index=1
  %zero = s32[] constant({start})
  %zero-start = (s32[], s32[], u32[]) copy-start(%zero)
  %zero-done = s32[] copy-done(%zero-start)
  %init = (f32[], s32[], s32[]) tuple(%g, %zero-done, %limit)
  %inner = (f32[], s32[], s32[]) while(%init), condition=%condition, body=%body
  %h = f32[] get-tuple-element(%inner), index=0
  %unchanged = s32[] get-tuple-element(%inner), index=2
  ROOT %u = (f32[], s32[]) tuple(%h, %unchanged)
}}

%once (r: (f32[], s32[])) -> pred[] {{
  %r = (f32[], s32[]) parameter(0)
  ROOT %yes = pred[] constant(true)
}}

ENTRY %main (x: f32[]) -> f32[] {{
  %x = f32[] parameter(0)
  %three = s32[] constant({limit})
  %five = s32[] constant(5)
  %sum = s32[] add(%three, %five)
  %both = (f32[], s32[]) tuple(%x, %sum)
  %w = (f32[], s32[]) while(%both), condition=%once, body=%outer
  ROOT %y = f32[] get-tuple-element(%w), index=0
}}
"""
USUAL = {
  "start": 0,
  "limit": 3,
  "step": 1,
  "move": "add",
  "direction": "LT",
  "kept": 2,
  "sides": "%j, %bound",
}


def loops(text):
  module = parse(text)
  return {
    i.name: trip_count(module, i)
    for c in module.computations.values()
    for i in c
    if i.opcode == "while"
  }


@pytest.mark.parametrize(
  "changes, trips",
  [
    ({}, 8),
    ({"step": 3}, 3),
    ({"direction": "LE"}, 9),
    ({"step": 3, "direction": "LE"}, 3),
    ({"start": 8}, 0),
    ({"direction": "NE", "step": 2}, 4),
    ({"direction": "NE", "step": 3}, None),
    ({"direction": "EQ"}, 0),
    ({"start": 20, "direction": "GT", "move": "subtract", "step": 5}, 3),
    ({"direction": "GT"}, 0),
    ({"start": 18, "direction": "GE", "step": -5}, 3),
    ({"sides": "%bound, %j"}, 0),
    ({"sides": "%bound, %j", "direction": "GT"}, 8),
    ({"kept": 1}, None),
    ({"step": 0}, None),
    ({"step": -1}, None),
    ({"move": "multiply"}, None),
    ({"sides": "%j, %j"}, None),
  ],
)
def test_a_counter(changes, trips):
  # Catches comparisons that are off by one or read from the wrong side, a bound that the body
  # changes, a counter that never arrives, and constants that are lost in copies, fusions, sums or
  # the tuples of two loops.
  known = loops(LOOPS.format(**USUAL | changes))
  assert known == {"inner": trips, "w": None}


def test_the_compilers_note_counts():
  # Catches a loop whose count the compiler notes, as on CPUs and GPUs, but which is derived again
  # or not reported.
  noted = 'body=%outer, backend_config={"known_trip_count":{"n":"12"}}'
  assert loops(LOOPS.format(**USUAL).replace("body=%outer", noted)) == {"inner": 8, "w": 12}


@pytest.mark.parametrize(
  "name, trips",
  [
    ("v5p_nested", [5, 7]),
    ("v4_windowed", [2]),
    ("v5p_step", [3]),
    ("h100_step", [3]),
    ("cpu_step", [3]),
    ("v5p_until", [None]),
  ],
)
def test_compiled_loops(name, trips):
  # Catches loops of the TPU's compiler that are not understood, and a loop until a value is reached
  # that gets a number. A fori_loop from 2 to 9 runs 7 times. A windowed product of 8 shards goes
  # both ways, with two shards in each direction an iteration.
  assert list(loops((SNIPPETS / f"{name}.hlo").read_text()).values()) == trips
