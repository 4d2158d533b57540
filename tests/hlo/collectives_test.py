"""Tests the bytes, kinds and counts of collectives, in all forms in which compilers print them."""

import dataclasses
import pathlib

import pytest

from moe_jax.hlo import collectives
from moe_jax.hlo.module import parse

pytestmark = pytest.mark.unit
SNIPPETS = pathlib.Path(__file__).parent / "snippets"
MESH = {"data": 2, "expert": 4}
EXPERT = "channel_id=1, replica_groups=[2,4]<=[8], use_global_device_ids=true"


def one(line, home="main"):
  text = (
    f"HloModule m, num_partitions=8\n\nENTRY %{home} () -> () {{\n  %a = f32[4,6] parameter(0)\n"
    f"  %b = bf16[8] parameter(1)\n  ROOT {line}\n}}\n"
  )
  module = parse(text)
  return collectives.collective(module, module[home].instructions["c"], MESH, 3.0, "outer")


@pytest.mark.parametrize(
  "line, kind, size, wire",
  [
    (f"%c = f32[16,6] all-gather(%a), {EXPERT}", "all-gather", 384, 288),
    (f"%c = (f32[4,6], f32[16,6]) all-gather-start(%a), {EXPERT}", "all-gather", 384, 288),
    (
      "%c = ((f32[4,6], bf16[8]), (f32[16,6], bf16[32]), u32[], u32[]) all-gather-start(%a, %b), "
      f"{EXPERT}",
      "all-gather",
      448,
      336,
    ),
    (f"%c = f32[4,6] all-reduce(%a), {EXPERT}", "all-reduce", 96, 144),
    (f"%c = (f32[4,6], bf16[8]) all-reduce-start(%a, %b), {EXPERT}", "all-reduce", 112, 168),
    (f"%c = f32[1,6] reduce-scatter(%a), {EXPERT}", "reduce-scatter", 96, 72),
    (f"%c = ((f32[4,6]), f32[1,6]) reduce-scatter-start(%a), {EXPERT}", "reduce-scatter", 96, 72),
    (f"%c = f32[4,6] all-to-all(%a), {EXPERT}, dimensions={{0}}", "all-to-all", 96, 72),
    (f"%c = (f32[4,6], f32[4,6]) all-to-all(%a, %a), {EXPERT}", "all-to-all", 192, 144),
    (
      f"%c = f32[9,6] ragged-all-to-all(%a, %a, %b, %b, %b, %b), {EXPERT}",
      "ragged-all-to-all",
      96,
      72,
    ),
    (
      "%c = (f32[4,6], f32[4,6], u32[], u32[]) collective-permute-start(%a), "
      "source_target_pairs={{0,1},{1,0}}",
      "collective-permute",
      96,
      96,
    ),
  ],
)
def test_bytes(line, kind, size, wire):
  # Catches operands that are counted instead of results or the reverse, the offsets of ragged
  # arrays or the context of a start that are counted, a variadic collective of which only the first
  # array is counted, and a ring in which a device sends everything.
  found = one(line)
  assert (found.kind, found.bytes, found.wire_bytes, found.count) == (kind, size, wire, 3.0)
  assert found.op_name == "outer" and found.dtype == (
    "bf16+f32" if "%b)" in line and "ragged" not in line else "f32"
  )


def test_what_is_none():
  # Catches the end of an asynchronous pair that is counted again, and transfers to the host that
  # are counted as collectives.
  assert one("%c = f32[4,6] all-reduce-done(%a)") is None
  assert one("%c = (f32[4,6], u32[], token[]) send(%a, %b), is_host_transfer=true") is None


def test_all_reduces_that_keep_a_part():
  # Catches twice the bytes on the wire for the TPU's reduce-scatter, which is a fusion around an
  # all-reduce.
  found = one(
    f'%c = f32[4,6] all-reduce(%a), {EXPERT}, metadata={{op_name="own"}}',
    home="all-reduce-scatter.3.clone",
  )
  assert (found.kind, found.bytes, found.wire_bytes, found.op_name) == (
    "reduce-scatter",
    96,
    72,
    "own",
  )


def test_between_slices():
  # Catches a gather whose operand is counted instead of its result, slices on the wrong axis, and a
  # kind that is taken from the opcode `send`.
  module = parse((SNIPPETS / "v5e_2_slices.hlo").read_text())
  mesh = {"data": 4, "expert": 2, "model": 2}
  found = [collectives.collective(module, i, mesh, 1.0, "") for i in module[module.entry]]
  facts = {(c.kind, c.axes, c.group_size, c.bytes) for c in found if c}
  assert facts == {
    ("dcn-all-to-all", ("data",), 4, 131072),
    ("reduce-scatter", ("data", "expert"), 4, 131072),
    ("dcn-all-reduce", ("data",), 2, 32768),
    ("all-gather", ("data", "expert"), 4, 131072),
    ("dcn-all-gather", ("data",), 2, 262144),
    ("all-gather", ("data",), 2, 524288),
  }


def test_merging():
  # Catches parts of one asynchronous collective that are added up, different collectives of one
  # channel that are merged, and counts that are lost.
  base = collectives.Collective("all-gather", ("data",), 2, 8, 4.0, 6.0, "f32", "a")
  large = dataclasses.replace(base, bytes=80, wire_bytes=40.0, count=1.0)
  parts = [
    (("1", "0"), base),
    (("1", "0"), dataclasses.replace(base, count=2.0)),
    (("1", "1"), base),
  ]
  assert collectives.merged([(None, base), (None, base), *parts, (None, large)]) == (
    dataclasses.replace(base, count=20.0),
    large,
  )


def test_parts_of_a_chain():
  # Catches a key that consists of the channel alone, which all collectives of one shard_map share.
  module = parse((SNIPPETS / "v5e_async_fusions.hlo").read_text())
  keys = [
    collectives.part_of(i)
    for c in module.computations.values()
    for i in c
    if i.opcode == "all-gather"
  ]
  assert keys == [("6", "0")] * 4
  last = parse((SNIPPETS / "v5p_step.hlo").read_text())["main.6_spmd"].instructions["all-reduce"]
  assert last.find("channel_id=4") and collectives.part_of(last) is None
