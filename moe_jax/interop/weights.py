"""Moves weights between a published checkpoint and the variables of a model, tensor by tensor."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.interop import unrolled
from moe_jax.interop.rows import Binding, bindings
from moe_jax.interop.tensors import Reader, refuse
from moe_jax.options import Config

# An array of the host that begins at a multiple of so many bytes becomes an array of a CPU device
# without being copied.
_ALIGNED = 64


class Bridge:
  """The map between the tensors of a family's checkpoints and the variables of one model.

  Attributes:
    leaves: The variables of the model.
    bound: The tensors of the checkpoint.
  """

  def __init__(self, family: Any, config: Config, mesh: jax.sharding.Mesh, fused: bool = False):
    """Binds each tensor to the weights that it makes; nothing is read.

    Args:
      family: A module of `families`.
      config: A config whose `model.vocab_size` is not 0.
      mesh: The mesh on which the variables live.
      fused: See `families`.
    """
    m = config.model
    self.leaves = unrolled.leaves(config, m.vocab_size, mesh)
    self.bound = list(bindings(family.rows(m, fused), unrolled.layers(m), m.moe.num_experts))
    self._ignored = [re.compile(each.replace("{L}", str(m.num_layers))) for each in family.IGNORED]
    # Unrolled name and expert -> the tensor that holds the weight, and which of its parts it is.
    self._sources: dict[tuple[str, int | None], tuple[Binding, int]] = {}
    for binding in self.bound:
      for part, name in enumerate(binding.ours):
        assert (name, binding.expert) not in self._sources, f"two rows make {name}"
        self._sources[name, binding.expert] = binding, part
    self._shapes = {name: leaf.each for leaf in self.leaves for name in leaf.names}
    unknown = {name for name, _ in self._sources} ^ self._shapes.keys()
    assert not unknown, f"no row, or no weight, for {sorted(unknown)}"

  def check(self, reader: Reader) -> None:
    """Raises ConfigError, which lists them, if tensors are missing, unknown or of another shape."""
    wanted = {binding.theirs: self.their_shape(binding) for binding in self.bound}
    problems = [f"{name} is missing" for name in wanted.keys() - reader.entries.keys()]
    for name, entry in reader.entries.items():
      if name not in wanted:
        if not any(each.fullmatch(name) for each in self._ignored):
          problems.append(f"{name} is not a tensor of this model")
      elif entry.shape != wanted[name]:
        problems.append(f"{name} has the shape {entry.shape} and must have {wanted[name]}")
    refuse("checkpoint", reader.folder, problems)

  def load(self, reader: Reader) -> dict[str, Any]:
    """Returns the variables, each in its place on the mesh and in the dtype of the checkpoint.

    Each process reads only what its own devices hold. Besides the variables there are never more
    than one tensor and one shard of a variable in memory.

    Raises:
      ConfigError: If the checkpoint does not fit the model; see `check`.
    """
    self.check(reader)
    return unrolled.nested({leaf.path: self._load_leaf(leaf, reader) for leaf in self.leaves})

  def tensors(self, variables: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields `(name, tensor)` for all tensors of a checkpoint, made of a model's variables."""
    arrays = {}
    for leaf in self.leaves:
      value: Any = variables
      for key in leaf.path:
        value = value[key]
      for i, name in enumerate(leaf.names):
        arrays[name] = (value, i if leaf.stacked else None)
    for binding in self.bound:
      yield (
        binding.theirs,
        binding.op.join(*(_part(arrays[n], binding.expert) for n in binding.ours)),
      )

  def their_shape(self, binding: Binding) -> tuple[int, ...]:
    """Returns the shape that a tensor must have."""
    ours = [self._shapes[name] for name in binding.ours]
    return tuple(binding.op.shape(*(s if binding.expert is None else s[1:] for s in ours)))

  def _load_leaf(self, leaf: unrolled.Leaf, reader: Reader) -> jax.Array:
    """Returns one variable."""
    names = [self._sources[key][0].theirs for key in self._keys(leaf.names, leaf.each)]
    dtype = jnp.result_type(*{reader.dtype(name) for name in names})
    shards: dict[tuple, list[Any]] = {}
    for device, index in leaf.place.addressable_devices_indices_map(leaf.shape).items():
      bounds = tuple(part.indices(n)[:2] for part, n in zip(index or (), leaf.shape, strict=True))
      shards.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, devices in shards.items():
      buffer = self._fill(leaf, bounds, dtype, reader)
      arrays += [jax.device_put(buffer, device) for device in devices]
      # Transfers are asynchronous, so that without this several shards would be in memory.
      jax.block_until_ready(arrays[-len(devices) :])
      del buffer
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.place, arrays)

  def _keys(self, names: Sequence[str], shape: Sequence[int]) -> list[tuple[str, int | None]]:
    """Returns the keys of `_sources` of some weights of this shape."""
    found: list[tuple[str, int | None]] = []
    for name in names:
      whole = (name, None) in self._sources
      found += [(name, None)] if whole else [(name, e) for e in range(shape[0])]
    return found

  def _fill(
    self, leaf: unrolled.Leaf, bounds: Sequence[tuple[int, int]], dtype: Any, reader: Reader
  ) -> np.ndarray:
    """Returns a shard of a variable, which `bounds` delimit along each axis."""
    buffer = _empty([stop - start for start, stop in bounds], dtype)
    rest = bounds[1:] if leaf.stacked else bounds
    chosen = leaf.names[slice(*bounds[0])] if leaf.stacked else leaf.names
    for i, name in enumerate(chosen):
      target = buffer[i] if leaf.stacked else buffer
      if (name, None) in self._sources:
        target[...] = self._read((name, None), reader)[_slices(rest)]
        continue
      for place, expert in enumerate(range(*rest[0])):
        target[place] = self._read((name, expert), reader)[_slices(rest[1:])]
    return buffer

  def _read(self, key: tuple[str, int | None], reader: Reader) -> np.ndarray:
    """Returns a weight, or the weight of one expert."""
    binding, part = self._sources[key]
    return binding.op.split(reader.read(binding.theirs))[part]


def _part(source: tuple[Any, int | None], expert: int | None) -> np.ndarray:
  """Returns the weight of a layer, or of an expert of it, of an array that may be stacked."""
  array, layer = source
  array = array if layer is None else array[layer]
  return np.asarray(array if expert is None else array[expert])


def _slices(bounds: Sequence[tuple[int, int]]) -> tuple[slice, ...]:
  return tuple(slice(*each) for each in bounds)


def _empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
  """Returns an uninitialised array that begins at a multiple of `_ALIGNED` bytes."""
  size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
  room = np.empty(size + _ALIGNED, np.uint8)
  start = -room.ctypes.data % _ALIGNED
  return room[start : start + size].view(dtype).reshape(shape)
