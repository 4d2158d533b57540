"""Builds the device mesh, which has four named axes."""

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

# data: every position along it holds a whole copy of the model.
# fsdp: splits all weights.
# expert: splits the experts among devices, and splits the other weights further than fsdp does.
# tensor: splits heads, FFN widths and the vocabulary; its devices work on the same tokens.
# The batch is split over data, fsdp and expert.
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
  """Returns the number of devices along each of `AXES`.

  Args:
    sizes: Axis name to size. A missing axis has size 1. One axis may be -1, which means all the
      devices that the other axes leave.
    num_devices: The number of available devices. The mesh may use fewer, but never more.

  Raises:
    ConfigError: If an axis is unknown, a size is below 1, two sizes are -1, or the mesh does not
      fit the devices. In the last case the message names the nearest meshes that fit.
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
      f"it needs {_needs_words(wanted, fixed)} and there are {num_devices} devices; "
      f"nearest meshes that fit: {nearest_meshes(sizes, num_devices)}",
    )
  return tuple(num_devices // fixed if size == -1 else size for size in wanted)


def make_mesh(sizes: Mapping[str, int], devices: Sequence | None = None) -> jax.sharding.Mesh:
  """Returns a mesh over the first of `devices`, whose axes are all `AxisType.Auto` (GSPMD).

  On TPUs the axes lie along the torus of the slice. If there are several slices, between which the
  network is slow, only the most significant part of `data` extends across them. A separate axis for
  slices before `data` would compile to the same program: gradients are reduce-scattered within a
  slice, all-reduced between slices, and gathered within a slice again.

  Args:
    sizes: Axis name to size, as for `mesh_sizes`.
    devices: The available devices. None means `jax.devices()`.

  Raises:
    ConfigError: As for `mesh_sizes`, or if `data` is not a multiple of the number of slices.
  """
  devices = jax.devices() if devices is None else list(devices)
  shape = mesh_sizes(sizes, len(devices))
  devices = devices[: math.prod(shape)]
  if devices[0].platform != "tpu":
    # JAX lists devices process by process, so the last axes lie within a process if they fit.
    array = np.array(devices).reshape(shape)
  else:
    array = _along_the_torus(shape, devices)
  return jax.sharding.Mesh(array, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def _along_the_torus(shape: tuple[int, ...], devices: Sequence) -> np.ndarray:
  """Returns TPU devices in the shape of a mesh, with its axes along the torus."""
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
  """Returns "cpu", "gpu" or "tpu", the platform of the mesh's devices.

  This may differ from the host's platform, as in a dry run for a machine that is not attached.
  """
  return mesh.devices.flat[0].platform


def _needs_words(wanted: Sequence[int], fixed: int) -> str:
  return f"a multiple of {fixed} devices" if -1 in wanted else f"{fixed} devices"


def _factorizations(n: int, parts: int) -> Iterator[tuple[int, ...]]:
  """Yields all tuples of `parts` positive integers whose product is n."""
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
  """Returns the meshes that use all devices and differ least from `sizes`, as text.

  The text is such as "data=2 expert=4; expert=8", with the nearest mesh first, or "" if there is no
  such mesh. Two meshes differ by the sum over axes of |log(size / requested size)|.

  Args:
    sizes: Axis name to requested size. An axis of size -1 may have any size.
    num_devices: The number of devices.
    fits: Whether a mesh, given as axis name to size, is acceptable.
    count: The largest number of meshes to return.
  """
  wanted = [sizes.get(axis, 1) for axis in AXES]
  shapes = list(_factorizations(num_devices, len(AXES)))

  def distance(shape):
    return sum(
      abs(math.log(size / want)) for size, want in zip(shape, wanted, strict=True) if want > 0
    )

  meshes: Iterator[Mapping[str, int]] = (
    dict(zip(AXES, shape, strict=True)) for shape in sorted(shapes, key=lambda s: (distance(s), s))
  )

  def mesh_text(mesh):
    return " ".join(f"{axis}={n}" for axis, n in mesh.items() if n > 1) or "data=1"

  return "; ".join(mesh_text(mesh) for mesh in itertools.islice(filter(fits, meshes), count))
