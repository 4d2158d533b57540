"""Tests how groups of devices are mapped to mesh axes."""

import pytest

from moe_jax.hlo import groups
from moe_jax.hlo.instruction import Instruction

pytestmark = pytest.mark.unit
MESH = (("data", 2), ("expert", 4), ("tensor", 1))


def reach(attributes, mesh=MESH, opcode="all-to-all", partitions=8):
  return groups.reach(
    Instruction("x", "f32[8]", opcode, f"%a), {attributes}", 3, "main"), mesh, partitions
  )


@pytest.mark.parametrize(
  "attributes, axes, size",
  [
    ("replica_groups={{0,1,2,3},{4,5,6,7}}", ("expert",), 4),
    ("replica_groups={{3,1,0,2},{4,5,6,7}}", ("expert",), 4),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",), 2),
    ("replica_groups=[1,8]<=[8]", ("data", "expert"), 8),
    ("channel_id=1, replica_groups={}", ("data", "expert"), 8),
    # Half of the axis.
    ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("expert",), 2),
    ("replica_groups={{0,2,4,6},{1,3,5,7}}", ("data", "expert"), 4),
    # Diagonals.
    ("replica_groups={{0,5},{1,4},{2,7},{3,6}}", ("?",), 2),
    # Two groups along one axis, and two along another.
    ("replica_groups={{0,1},{2,6},{3,7},{4,5}}", ("?",), 2),
    ("replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}", (), 1),
    ("source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}", ("expert",), 4),
    ("source_target_pairs={{0,4},{1,5},{2,6},{3,7}}", ("data",), 2),
    ("source_target_pairs={{0,0},{1,4},{4,1}}", ("?",), 2),
  ],
)
def test_axes(attributes, axes, size):
  # Catches partitions that are numbered column by column, a group that passes for a box but is
  # none, and results that depend on the order of the devices in a group.
  assert reach(attributes) == (axes, size)


def test_groups_of_replicas_stand_for_all_their_partitions():
  # Catches {{0}}, which means the only replica, read as groups of one partition. All-to-alls always
  # list partitions, and so this concerns the other collectives.
  assert reach("channel_id=1, replica_groups={{0}}", opcode="all-reduce") == (("data", "expert"), 8)
  named = "channel_id=1, replica_groups={{0,4},{1,5},{2,6},{3,7}}, use_global_device_ids=true"
  assert reach(named, opcode="all-reduce") == (("data",), 2)


@pytest.mark.parametrize(
  "target, axes, size",
  [
    ('"{1,2}x{0:3}"', ("data",), 2),
    ("{{100002,200002},{100000,200000}}", ("data",), 2),
    ("{{100002,100003,200002,200003}}", ("data",), 4),
  ],
)
def test_between_slices(target, axes, size):
  # Catches megascale's numbers of devices within a slice that are taken for places in the mesh. Its
  # order of devices is its own.
  attributes = (
    f"frontend_attributes={{_xla_megascale_target={target},"
    '_xla_megascale_transfer_type="ALL_TO_ALL"}'
  )
  assert reach(attributes, opcode="send", partitions=4) == (axes, size)


def test_errors_name_the_line():
  # Catches a program for a larger machine, or a new notation, that is passed over.
  with pytest.raises(ValueError, match="line 3.*more devices than the mesh"):
    reach("replica_groups={{0,8}}")
  with pytest.raises(ValueError, match="line 3.*not understood"):
    reach("replica_groups=new")
