"""Finds which rows of a batch each process has to read."""

from __future__ import annotations

from collections.abc import Mapping

import jax

from moe_jax.errors import ConfigError
from moe_jax.sharding.rules import batch_sharding


def reader(mesh: jax.sharding.Mesh) -> tuple[int, int]:
  """Returns `(index, count)`: this process reads block `index` of `count` equal blocks of rows.

  Processes that differ only in their position along the axis tensor work on the same tokens, and so
  they read the same block.

  Raises:
    ConfigError: As for `reader_of`.
  """
  # A batch of one row per device shows where each device's part of any batch begins.
  place = batch_sharding(mesh)
  shards = {
    device: index[0].start or 0 for device, index in place.devices_indices_map((mesh.size,)).items()
  }
  held: dict[int, set[int]] = {}
  for device, start in shards.items():
    held.setdefault(device.process_index, set()).add(start)
  return reader_of(held, jax.process_index(), dict(mesh.shape))


def reader_of(
  held: Mapping[int, set[int]], process: int, mesh: Mapping[str, int]
) -> tuple[int, int]:
  """Returns the `(index, count)` of `reader` for one process.

  Args:
    held: Process index to the parts of a batch that its devices hold.
    process: The index of the process in question.
    mesh: Axis name to size, for the error message.

  Raises:
    ConfigError: If two processes share some parts of a batch but not all, if processes hold
      different numbers of parts, or if `process` has no device on the mesh.
  """
  blocks = sorted({tuple(sorted(parts)) for parts in held.values()})
  if process not in held:
    raise ConfigError(
      "mesh", dict(mesh), f"leaves process {process} without a device; use all devices"
    )
  if (
    sum(map(len, blocks)) != len(set().union(*blocks)) or len({len(block) for block in blocks}) > 1
  ):
    raise ConfigError(
      "mesh",
      dict(mesh),
      "would give some processes a part of each other's rows; let tensor divide, "
      "or be a multiple of, the devices of a process",
    )
  return blocks.index(tuple(sorted(held[process]))), len(blocks)
