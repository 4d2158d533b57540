"""The mesh: four named axes over whatever devices there are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import jax

from moe_jax.errors import ConfigError

# data: whole copies of the model. fsdp: splits the batch and the parameters. expert: splits the experts.
# tensor: splits heads, FFN widths and the vocabulary.
AXES = ("data", "fsdp", "expert", "tensor")


def mesh_sizes(sizes: Mapping[str, int], num_devices: int) -> tuple[int, ...]:
  """Devices along each of `AXES`; a size of -1 takes all that are left.

  Args:
    sizes: axis name -> size; at most one is -1, the others at least 1; a missing axis is 1.
    num_devices: devices there are. The mesh may use fewer of them, never more.

  Raises:
    ConfigError: unknown axis, size below 1, two sizes of -1, or a mesh that does not fit. Names the nearest that do.
  """
  for axis, size in sizes.items():
    if axis not in AXES:
      raise ConfigError(f"mesh.{axis}", size, f"the mesh has the axes {', '.join(AXES)}")
    if not isinstance(size, int) or size < 1 and size != -1:
      raise ConfigError(f"mesh.{axis}", size, "the size of a mesh axis is at least 1, or -1 for all devices left")
  wanted = [sizes.get(axis, 1) for axis in AXES]
  if wanted.count(-1) > 1:
    raise ConfigError("mesh", dict(sizes), "only one axis can take all the devices that are left (-1)")
  fixed = math.prod(size for size in wanted if size != -1)
  if fixed > num_devices or -1 in wanted and num_devices % fixed:
    raise ConfigError("mesh", dict(sizes), f"it needs {_needs(wanted, fixed)} and there are {num_devices} devices; "
                      f"nearest meshes that fit: {_nearest(wanted, num_devices)}")
  return tuple(num_devices // fixed if size == -1 else size for size in wanted)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
  """The mesh of `sizes` (see `mesh_sizes`) over the first `devices`; every axis is `AxisType.Auto` (GSPMD)."""
  devices = jax.devices() if devices is None else list(devices)
  shape = mesh_sizes(sizes, len(devices))
  return jax.make_mesh(shape, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES),
                       devices=devices[:math.prod(shape)])


def platform(mesh: jax.sharding.Mesh) -> str:
  """"cpu", "gpu" or "tpu": what the mesh's devices say of themselves, on whatever host this runs."""
  return mesh.devices.flat[0].platform


def _needs(wanted: Sequence[int], fixed: int) -> str:
  return f"a multiple of {fixed} devices" if -1 in wanted else f"{fixed} devices"


def _nearest(wanted: Sequence[int], num_devices: int, count: int = 3) -> str:
  """The `count` meshes that use all the devices and differ least from `wanted` (by ratios of sizes)."""
  divisors = [d for d in range(1, num_devices + 1) if num_devices % d == 0]
  fits = [shape for shape in itertools.product(divisors, repeat=len(AXES)) if math.prod(shape) == num_devices]
  distance = lambda shape: sum(abs(math.log(size / want)) for size, want in zip(shape, wanted, strict=True) if want > 0)
  fits.sort(key=lambda shape: (distance(shape), shape))
  told = lambda shape: " ".join(f"{a}={n}" for a, n in zip(AXES, shape, strict=True) if n > 1) or "data=1"
  return "; ".join(told(shape) for shape in fits[:count])
