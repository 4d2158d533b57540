"""What a program sends between devices: kind, mesh axes, bytes, and how often."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

from moe_jax.hlo import groups
from moe_jax.hlo.instruction import Instruction, Shape
from moe_jax.hlo.module import Module

KINDS = {
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
}
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
# TPU: fusions of these names hold an all-reduce of which each device keeps a part
_SCATTERS = "all-reduce-scatter"
_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a program, of one device.

  Attributes:
    kind: all-gather, all-reduce, reduce-scatter, all-to-all, ragged-all-to-all, collective-permute,
      collective-broadcast; between slices the same with "dcn-" before it.
    axes: mesh axes along which its groups extend, in mesh order; ("?",) where they are no boxes of
      the mesh.
    group_size: devices that take part together.
    bytes: of the result (all-gather) or the operand (all others), one execution. Of a
      ragged-all-to-all these are the bounds of the buffer; what travels is up to the data.
    wire_bytes: what one device sends in one execution if the group is a ring.
    count: executions a step, loops multiplied out.
    dtype: "bf16+f32" where several arrays travel together.
    op_name: what JAX called it, for people; "" if nothing.
  """

  kind: str
  axes: tuple[str, ...]
  group_size: int
  bytes: int
  wire_bytes: float
  count: float
  dtype: str
  op_name: str


def op_name(instruction: Instruction) -> str:
  return name[1] if (name := instruction.find(_NAME)) else ""


def kind(instruction: Instruction) -> str | None:
  """One of `KINDS`, perhaps after "dcn-"; None for what is no collective or ends one that was
  started elsewhere."""
  if instruction.opcode == "send":
    transfer = instruction.find(_BETWEEN_SLICES)
    name = transfer[1].lower().replace("_", "-") if transfer else None
    return name and f"dcn-{name.replace('one-to-one', 'collective-permute')}"
  name = instruction.opcode.removesuffix("-start")
  if name == "all-reduce" and instruction.home.startswith(_SCATTERS):
    return "reduce-scatter"
  return name if name in KINDS else None


def collective(
  module: Module, instruction: Instruction, mesh: Mapping[str, int], count: float, name: str
) -> Collective | None:
  """What an instruction sends, executed `count` times; None if it is no collective. `name` is used
  if it has none."""
  if (what := kind(instruction)) is None:
    return None
  axes, size = groups.reach(instruction, tuple(mesh.items()), module.partitions)
  shapes = _sent(module, instruction, what)
  total = sum(shape.bytes for shape in shapes)
  ring = (size - 1) / size
  share = (
    1.0
    if what.endswith(("permute", "broadcast"))
    else 2 * ring
    if what.endswith("all-reduce")
    else ring
  )
  return Collective(
    what,
    axes,
    size,
    total,
    share * total,
    count,
    "+".join(sorted({s.dtype for s in shapes})),
    op_name(instruction) or name,
  )


def _sent(module: Module, instruction: Instruction, what: str) -> tuple[Shape, ...]:
  """The arrays whose bytes count: results of a gather, operands of all others."""
  home = module[instruction.home]
  if (
    what == "dcn-all-gather"
  ):  # the send has the operand; its recv has the result and stands beside it
    same = instruction.find(r'_xla_host_transfer_rendezvous="[^"]*"')
    received = [i for i in home if i.opcode == "recv" and same and same[0] in i.tail]
    if not received:
      raise instruction.error("a gather between slices without its recv")
    return received[0].shapes[:1]
  if what == "all-gather":  # a start's result is (operands, results, ...)
    operands = len(instruction.operands) if instruction.opcode.endswith("-start") else 0
    return instruction.shapes[operands : 2 * operands or None]
  one = what.startswith(("dcn-", "ragged")) or instruction.find(
    r"slice_sizes="
  )  # the others are tokens and offsets
  return tuple(
    shape
    for i in range(1 if one else len(instruction.operands))
    for shape in home.operand(instruction, i).shapes
  )


def merged(found: Iterable[tuple[tuple | None, Collective]]) -> tuple[Collective, ...]:
  """One entry for each distinct (kind, axes, bytes, dtype, op_name), the one that sends most a step
  first.

  Args:
    found: (key, collective). TPUs spread one collective over several fusions; such parts share a
      key, and of them the one that is executed least often counts.
  """
  whole: dict[tuple, Collective] = {}
  for i, (key, one) in enumerate(found):
    key = (i,) if key is None else key
    if key not in whole or one.count < whole[key].count:
      whole[key] = one
  distinct: dict[tuple, Collective] = {}
  for one in whole.values():
    key = (one.kind, one.axes, one.bytes, one.dtype, one.op_name)
    before = distinct[key].count if key in distinct else 0.0
    distinct[key] = dataclasses.replace(one, count=before + one.count)
  return tuple(sorted(distinct.values(), key=lambda one: -one.wire_bytes * one.count))


def part_of(instruction: Instruction) -> tuple | None:
  """The key of `merged`. A channel alone is none: everything from one shard_map has the same."""
  chain, channel = (instruction.find(p) for p in (r'chain_id="(\d+)"', r"channel_id=(\d+)"))
  return (channel and channel[1], chain[1]) if chain else None
