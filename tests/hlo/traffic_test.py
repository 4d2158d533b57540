"""Tests the bytes of memory traffic of single operations."""

import pathlib

import pytest

from moe_jax.hlo.module import parse
from moe_jax.hlo.traffic import traffic

pytestmark = pytest.mark.unit
SNIPPETS = pathlib.Path(__file__).parent / "snippets"

# %stack holds 10 slices of 400 bytes. The fusion %read reads one slice, through a fusion inside it,
# and the fusion %write updates one in place.
TEXT = """\
HloModule m

%inner (s: f32[10,100], k: s32[]) -> f32[1,100] {
  %s = f32[10,100] parameter(0)
  %k = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,100] dynamic-slice(%s, %k, %zero), dynamic_slice_sizes={1,100}
}

%reads (r: f32[10,100], n: s32[]) -> f32[100] {
  %r = f32[10,100] parameter(0)
  %n = s32[] parameter(1)
  %f = f32[1,100] fusion(%r, %n), kind=kLoop, calls=%inner
  ROOT %b = f32[100] bitcast(%f)
}

%writes (w: f32[10,100], v: f32[100], m: s32[]) -> f32[10,100] {
  %w = f32[10,100] parameter(0)
  %v = f32[100] parameter(1)
  %row = f32[1,100] bitcast(%v)
  %m = s32[] parameter(2)
  ROOT %u = f32[10,100] dynamic-update-slice(%w, %row, %m, %m)
}

ENTRY %main (stack: f32[10,100], i: s32[]) -> f32[10,100] {
  %stack = f32[10,100] parameter(0)
  %i = s32[] parameter(1)
  %read = f32[100] fusion(%stack, %i), kind=kLoop, calls=%reads
  %near = f32[100]{0:T(128)S(1)} copy(%read)
  %double = f32[100]{0:T(128)S(1)} add(%near, %near)
  %start = (f32[100]{0:T(128)S(1)}, f32[100], u32[]) copy-start(%read)
  %done = f32[100]{0:T(128)S(1)} copy-done(%start)
  %some = ((f32[10,100]), f32[2,100], s32[]) slice-start(%stack), slice={[0:2], [0:100]}
  %had = f32[2,100] slice-done(%some)
  %rows = f32[3,100] gather(%stack, %i), offset_dims={1}
  %all = f32[10,100] add(%stack, %stack)
  %buffer = f32[10,100] custom-call(), custom_call_target="AllocateBuffer"
  ROOT %write = f32[10,100] fusion(%stack, %read, %i), kind=kLoop, calls=%writes
}
"""


@pytest.mark.parametrize(
  "name, size",
  [
    ("stack", 0),
    ("buffer", 0),
    ("read", 400 + 4 + 400),
    ("near", 400),
    ("double", 0),
    ("start", 400),
    ("done", 0),
    ("some", 800),
    ("had", 800),
    ("rows", 1200 + 4 + 1200),
    ("all", 12000),
    ("write", 400 + 400 + 4),
  ],
)
def test_traffic(name, size):
  # Catches a whole stack of weights that is charged for each layer's slice, on-chip memory that is
  # charged, and an asynchronous copy whose two ends are both charged for reading and writing.
  module = parse(TEXT)
  assert traffic(module, module["main"].instructions[name]) == size


def test_collectives_under_way_are_not_charged_to_fusions():
  # Catches a gather's buffers that are charged to each of the fusions that run meanwhile. All
  # buffers are placed in main memory for this test.
  module = parse((SNIPPETS / "v5e_async_fusions.hlo").read_text().replace("S(1)", ""))
  charged = {i.name: traffic(module, i) for i in module[module.entry] if i.opcode == "fusion"}
  # The product reads activations and weights, and writes its result.
  gathered, product = 262144, 524288 + 65536 + 262144
  assert charged["async-collective-start"] == gathered
  assert charged["fusion.175"] == product
  # The shard is counted once more, which is allowed because the traffic is an upper bound.
  assert charged["async-collective-done"] == gathered // 2
