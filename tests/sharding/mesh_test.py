"""Tests that a mesh fits the devices, or that the error names meshes that would."""

import types

import jax
import pytest

from moe_jax.errors import ConfigError
from moe_jax.sharding import AXES, make_mesh, mesh_sizes, platform

pytestmark = pytest.mark.unit


def test_minus_one_takes_what_is_left():
  # Catches a size of -1 that ignores the other axes.
  assert mesh_sizes({"data": -1, "fsdp": 2, "expert": 1, "tensor": 1}, 8) == (4, 2, 1, 1)
  assert mesh_sizes({"expert": -1}, 8) == (1, 1, 8, 1)


def test_a_mesh_may_leave_devices_unused():
  # Catches a mesh of 2 that takes all 8 devices.
  mesh = make_mesh({"data": 2})
  assert mesh.size == 2 and mesh.axis_names == AXES and tuple(mesh.shape.values()) == (2, 1, 1, 1)


def test_axes_are_auto_and_the_mesh_knows_its_platform():
  # Catches explicit axes, for which GSPMD does not propagate shardings.
  mesh = make_mesh({"data": -1})
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
  assert platform(mesh) == "cpu"


def test_slices_are_told_apart_by_data_alone():
  # Catches tensor parallelism over the data centre's network.
  chips = [types.SimpleNamespace(platform="tpu", slice_index=i // 4) for i in range(8)]
  with pytest.raises(ConfigError, match="mesh.data=1: must be a multiple of the 2 slices"):
    make_mesh({"tensor": 8}, chips)


@pytest.mark.parametrize(
  "sizes, words",
  [
    ({"data": 16}, "data=8"),  # the nearest that fits
    ({"data": 4, "expert": 4}, "data=2 expert=4"),
    ({"data": -1, "fsdp": 3}, "a multiple of 3"),
    ({"data": -1, "fsdp": -1}, "only one"),
    ({"data": 0}, "at least 1"),
    ({"dta": 2}, "data, fsdp, expert, tensor"),
  ],
)
def test_what_does_not_fit_is_refused_with_a_remedy(sizes, words):
  # Catches JAX's own error about shapes, minutes later.
  with pytest.raises(ConfigError, match="mesh") as error:
    mesh_sizes(sizes, 8)
  assert words in str(error.value)
