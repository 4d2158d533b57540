"""The mesh: four named axes over whatever devices there are."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated

import jax
import numpy as np
from jax.experimental import mesh_utils

from moe_jax.errors import ConfigError
from moe_jax.options import Bounds, Options, option

# data: whole copies of the model. fsdp: splits all weights. expert: splits the experts, and each of
# the other weights further. All three split the batch. tensor: splits heads, FFN widths and the
# vocabulary; its devices work on the same tokens.
AXES = ("data", "fsdp", "expert", "tensor")
MOST_DEVICES = 2**20
_SIZE = Bounds(-1, MOST_DEVICES, "no machine has a million devices")


@dataclasses.dataclass(frozen=True)
class MeshOptions(Options):
  """The section `mesh`: devices along each axis; one of them may be -1, all that are left."""

  data: Annotated[int, _SIZE] = option(-1, "Copies of the model, each of which reads other rows.")
  fsdp: Annotated[int, _SIZE] = option(1, "Devices that share all weights, and read other rows.")
  expert: Annotated[int, _SIZE] = option(1, "Devices that share the experts, and read other rows.")
  tensor: Annotated[int, _SIZE] = option(
    1, "Devices that share heads, FFN widths and the vocabulary, and read the same rows."
  )


def mesh_sizes(sizes: Mapping[str, int], num_devices: int) -> tuple[int, ...]:
  """Devices along each of `AXES`; a size of -1 takes all that are left.

  Args:
    sizes: axis name -> size; at most one is -1, the others at least 1; a missing axis is 1.
    num_devices: devices there are. The mesh may use fewer of them, never more.

  Raises:
    ConfigError: unknown axis, size below 1, two sizes of -1, or a mesh that does not fit. Names the
      nearest that do.
  """
  for axis, size in sizes.items():
    if axis not in AXES:
      raise ConfigError(f"mesh.{axis}", size, f"the mesh has the axes {', '.join(AXES)}")
    if not isinstance(size, int) or size < 1 and size != -1:
      raise ConfigError(
        f"mesh.{axis}", size, "the size of a mesh axis is at least 1, or -1 for all devices left"
      )
  wanted = [sizes.get(axis, 1) for axis in AXES]
  if wanted.count(-1) > 1:
    raise ConfigError(
      "mesh", dict(sizes), "only one axis can take all the devices that are left (-1)"
    )
  fixed = math.prod(size for size in wanted if size != -1)
  if fixed > num_devices or -1 in wanted and num_devices % fixed:
    raise ConfigError(
      "mesh",
      dict(sizes),
      f"it needs {_needs(wanted, fixed)} and there are {num_devices} devices; "
      f"nearest meshes that fit: {nearest_meshes(sizes, num_devices)}",
    )
  return tuple(num_devices // fixed if size == -1 else size for size in wanted)


def make_mesh(sizes: Mapping[str, int], devices: Sequence | None = None) -> jax.sharding.Mesh:
  """The mesh of `sizes` (see `mesh_sizes`) over the first `devices`; every axis is `AxisType.Auto`
  (GSPMD).

  On a TPU its axes lie along the torus; several slices, between which the network is slow, are told
  apart by the first part of `data` alone. An axis of slices before `data` would compile to the same
  program: gradients are reduce-scattered within a slice, all-reduced between slices, and gathered
  within a slice again.

  Raises:
    ConfigError: see `mesh_sizes`; or `data` does not hold whole slices.
  """
  devices = jax.devices() if devices is None else list(devices)
  shape = mesh_sizes(sizes, len(devices))
  devices = devices[: math.prod(shape)]
  if devices[0].platform != "tpu":
    array = np.array(devices).reshape(shape)  # in JAX's order: process by process
  else:
    array = _along_the_torus(shape, devices)
  return jax.sharding.Mesh(array, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def _along_the_torus(shape: tuple[int, ...], devices: Sequence) -> np.ndarray:
  slices = len({getattr(device, "slice_index", None) or 0 for device in devices})
  if slices == 1:
    return mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
  if shape[0] % slices:
    raise ConfigError(
      "mesh.data",
      shape[0],
      f"must be a multiple of the {slices} slices: the network between them is "
      "too slow for any other axis",
    )
  return mesh_utils.create_hybrid_device_mesh(
    (shape[0] // slices, *shape[1:]),
    (slices, 1, 1, 1),
    devices=devices,
    allow_split_physical_axes=True,
  )


def platform(mesh: jax.sharding.Mesh) -> str:
  """ "cpu", "gpu" or "tpu": what the mesh's devices say of themselves, on whatever host this
  runs."""
  return mesh.devices.flat[0].platform


def _needs(wanted: Sequence[int], fixed: int) -> str:
  return f"a multiple of {fixed} devices" if -1 in wanted else f"{fixed} devices"


def _factorizations(n: int, parts: int) -> Iterator[tuple[int, ...]]:
  """All tuples of `parts` whole numbers whose product is n."""
  if parts == 1:
    yield (n,)
    return
  small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
  for first in sorted({*small, *(n // d for d in small)}):
    yield from ((first, *rest) for rest in _factorizations(n // first, parts - 1))


def nearest_meshes(
  sizes: Mapping[str, int],
  num_devices: int,
  fits: Callable[[Mapping[str, int]], bool] = lambda sizes: True,
  count: int = 3,
) -> str:
  """The `count` meshes that use all the devices, that `fits` accepts and that differ least from
  `sizes` (by ratios).

  In words, as in "data=2 expert=4; expert=8"; "" if there is none. An axis of `sizes` that is -1
  may be anything.
  """
  wanted = [sizes.get(axis, 1) for axis in AXES]
  shapes = list(_factorizations(num_devices, len(AXES)))

  def distance(shape):
    return sum(
      abs(math.log(size / want)) for size, want in zip(shape, wanted, strict=True) if want > 0
    )

  meshes = (
    dict(zip(AXES, shape, strict=True)) for shape in sorted(shapes, key=lambda s: (distance(s), s))
  )

  def told(mesh):
    return " ".join(f"{axis}={n}" for axis, n in mesh.items() if n > 1) or "data=1"

  return "; ".join(told(mesh) for mesh in itertools.islice(filter(fits, meshes), count))
