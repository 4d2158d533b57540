"""Finds what a program sends between devices: kinds, mesh axes, bytes and execution counts."""

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
# TPU programs write a reduce-scatter as an all-reduce inside a fused computation whose name starts
# with this prefix. Each device keeps only its part of the result.
_REDUCE_SCATTER_PREFIX = "all-reduce-scatter"
_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a program, as one device sees it.

  Attributes:
    kind: One of `KINDS`. A transfer between slices has "dcn-" before the kind.
    axes: The mesh axes along which its groups extend, in mesh order. They are ("?",) if the groups
      are not boxes of the mesh.
    group_size: The number of devices that take part together.
    bytes: The bytes of one execution: those of the result for an all-gather, and those of the
      operand for all other kinds. For a ragged-all-to-all this is the size of the whole buffer; how
      much of it is sent depends on the data.
    wire_bytes: The bytes that one device sends in one execution if the group is a ring.
    count: The number of executions in a step, with loops multiplied out.
    dtype: The element type, such as "bf16", or "bf16+f32" if several arrays are sent together.
    op_name: The name of the JAX operation, for display. It is "" if the program has none.
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
  """Returns the name of the JAX operation behind an instruction, or "" if it has none."""
  return name[1] if (name := instruction.find(_NAME)) else ""


def kind(instruction: Instruction) -> str | None:
  """Returns the kind of collective that an instruction is or starts, or None if there is none.

  The kind is one of `KINDS`, with "dcn-" before it for a transfer between slices. An instruction
  that only completes a collective which another one started counts as none.
  """
  if instruction.opcode == "send":
    transfer = instruction.find(_BETWEEN_SLICES)
    name = transfer[1].lower().replace("_", "-") if transfer else None
    return name and f"dcn-{name.replace('one-to-one', 'collective-permute')}"
  name = instruction.opcode.removesuffix("-start")
  if name == "all-reduce" and instruction.home.startswith(_REDUCE_SCATTER_PREFIX):
    return "reduce-scatter"
  return name if name in KINDS else None


def collective(
  module: Module, instruction: Instruction, mesh: Mapping[str, int], count: float, name: str
) -> Collective | None:
  """Returns the collective that an instruction is or starts, or None if it is no collective.

  Args:
    module: The module that contains the instruction.
    instruction: Any instruction.
    mesh: Axis name to size, in mesh order.
    count: The number of executions of the instruction in a step.
    name: The `op_name` to use if the instruction itself has none.

  Raises:
    ValueError: If the groups or the operands of a collective cannot be read.
  """
  if (kind_name := kind(instruction)) is None:
    return None
  axes, size = groups.reach(instruction, tuple(mesh.items()), module.partitions)
  shapes = _counted_shapes(module, instruction, kind_name)
  total = sum(shape.bytes for shape in shapes)
  # On a ring of n devices a gather, a scatter or an exchange sends (n - 1) / n of the array. An
  # all-reduce is a reduce-scatter followed by an all-gather, so it sends twice that.
  ring = (size - 1) / size
  share = (
    1.0
    if kind_name.endswith(("permute", "broadcast"))
    else 2 * ring
    if kind_name.endswith("all-reduce")
    else ring
  )
  return Collective(
    kind_name,
    axes,
    size,
    total,
    share * total,
    count,
    "+".join(sorted({s.dtype for s in shapes})),
    op_name(instruction) or name,
  )


def _counted_shapes(module: Module, instruction: Instruction, kind_name: str) -> tuple[Shape, ...]:
  """Returns the arrays whose bytes count: a gather's results, or the operands of any other kind."""
  home = module[instruction.home]
  if kind_name == "dcn-all-gather":
    # The send instruction has only the operand. The matching recv in the same computation has the
    # result, and both carry the same rendezvous name.
    rendezvous = instruction.find(r'_xla_host_transfer_rendezvous="[^"]*"')
    recvs = [i for i in home if i.opcode == "recv" and rendezvous and rendezvous[0] in i.tail]
    if not recvs:
      raise instruction.error("an all-gather between slices without its recv")
    return recvs[0].shapes[:1]
  if kind_name == "all-gather":
    # The result of all-gather-start is the tuple (operands, results, ...).
    operands = len(instruction.operands) if instruction.opcode.endswith("-start") else 0
    return instruction.shapes[operands : 2 * operands or None]
  # These instructions send only their first operand. The others are tokens and offsets.
  only_first = kind_name.startswith(("dcn-", "ragged")) or instruction.find(r"slice_sizes=")
  return tuple(
    shape
    for i in range(1 if only_first else len(instruction.operands))
    for shape in home.operand(instruction, i).shapes
  )


def merged(found: Iterable[tuple[tuple | None, Collective]]) -> tuple[Collective, ...]:
  """Merges equal collectives and sorts them by bytes sent in a step, largest first.

  The result has one entry for each distinct (kind, axes, bytes, dtype, op_name), whose `count` is
  the sum over the entry's collectives.

  Args:
    found: Pairs of a key and a collective. TPU programs spread one collective over several fusions;
      these parts share a key (see `part_of`), and only the part that is executed least often
      counts. None means that the collective stands alone.
  """
  by_key: dict[tuple, Collective] = {}
  for i, (key, part) in enumerate(found):
    key = (i,) if key is None else key
    if key not in by_key or part.count < by_key[key].count:
      by_key[key] = part
  distinct: dict[tuple, Collective] = {}
  for item in by_key.values():
    key = (item.kind, item.axes, item.bytes, item.dtype, item.op_name)
    earlier = distinct[key].count if key in distinct else 0.0
    distinct[key] = dataclasses.replace(item, count=earlier + item.count)
  return tuple(sorted(distinct.values(), key=lambda item: -item.wire_bytes * item.count))


def part_of(instruction: Instruction) -> tuple | None:
  """Returns the key that the parts of one collective share, or None if it is not split.

  The key needs the chain as well as the channel, because all collectives of one `shard_map` have
  the same channel.
  """
  chain, channel = (instruction.find(p) for p in (r'chain_id="(\d+)"', r"channel_id=(\d+)"))
  return (channel and channel[1], chain[1]) if chain else None
