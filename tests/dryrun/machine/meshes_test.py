"""Tests the table of meshes."""

import math

import pytest

from moe_jax.dryrun.machine import meshes, topology

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("config", "machine"), meshes.MESHES)
def test_a_mesh_has_as_many_devices_as_its_machine(config, machine):
  # Catches a factor that is missing or wrong, and a machine that does not exist.
  shipped, there = meshes.MESHES[config, machine], topology.parse(machine)
  assert math.prod(int(axis.split("=")[1]) for axis in shipped.split(",")) == there.num_devices
  assert meshes.find(f"configs/{config.replace(':', '.py:')}", there) == shipped


def test_other_pairs_have_none():
  # Catches the mesh of another variant, of another machine, or of another number of slices.
  assert meshes.find("configs/glam.py:1_7b_64e", topology.parse("v4:8x8x16")) is None
  assert meshes.find("configs/glam.py:64b_64e", topology.parse("v4:8x8x8")) is None
  assert meshes.find("configs/glam.py:64b_64e", topology.parse("v4:8x8x16", 2)) is None
