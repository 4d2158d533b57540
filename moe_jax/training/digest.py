"""Digests of all arrays of a state, and a search for numbers that are not finite.

The results do not depend on the mesh. A digest that is stored with a checkpoint can therefore be
compared after the checkpoint was restored on other devices. Each process reads only its own shards.
"""

from __future__ import annotations

import concurrent.futures
import os
import typing
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

_WRAP = 2**64
_BLOCK = 2**22  # numbers that are looked at together


class Examination(typing.NamedTuple):
  """The result of `examine`.

  Attributes:
    digests: Maps the path of each array, such as "params/embedding", to 32 hexadecimal digits.
    nonfinite: The paths of the arrays that hold a NaN or an infinity, in the order of the tree.
  """

  digests: dict[str, str]
  nonfinite: list[str]


def examine(tree: PyTree) -> Examination:
  """Returns the digests of all arrays of `tree`, and the paths of those that are not finite.

  A digest is a Fletcher checksum. It consists of the sum of the elements' bits, and of the sum of
  each element's bits times its index in row-major order, both modulo 2^64. Such sums are exact in
  any order of addition, so that every mesh gives the same ones. Each change of a single element
  changes the first sum; elements that are exchanged change the second one. The digest detects
  damage on the way to a disk and back. It is no defence against somebody who forges a checkpoint.
  """
  arrays = paths(tree)
  # Threads help, because NumPy's reductions release the GIL.
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    results = list(pool.map(_examine, arrays.values()))
  sums = _over_processes(np.array([result[:2] for result in results], np.uint64).reshape(-1, 2))
  bad_shards = _over_processes(np.array([result[2] for result in results], np.uint64))
  digests = {
    name: f"{total:016x}{weighted:016x}"
    for name, (total, weighted) in zip(arrays, sums.tolist(), strict=True)
  }
  nonfinite = [name for name, count in zip(arrays, bad_shards.tolist(), strict=True) if count]
  return Examination(digests, nonfinite)


def paths(tree: PyTree) -> dict[str, Array | np.ndarray]:
  """Returns the arrays of `tree` by their paths, in the order of `jax.tree.leaves`.

  A path is written as in "params/layer_0/ffn/up".
  """
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _examine(leaf: Array | np.ndarray) -> tuple[int, int, int]:
  """Returns this process's contribution to the digest of an array.

  Returns:
    The sum of the elements' bits; the sum of each element's bits times its row-major index; and the
    number of shards that hold numbers that are not finite. The sums are modulo 2^64.
  """
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  total = weighted = bad = 0
  for values, first in _shards(leaf):
    bad += int(jnp.issubdtype(values.dtype, np.inexact) and not _is_finite(values))
    bits = _bits(values)
    total += int(bits.sum(dtype=np.uint64))
    for axis in range(bits.ndim):
      # An element's row-major index is the sum over axes of its index times the axis' stride.
      # Therefore sums over the other axes suffice, and no array of indices is needed.
      others = tuple(a for a in range(bits.ndim) if a != axis)
      index = first[axis] + np.arange(bits.shape[axis], dtype=np.uint64)
      stride = int(
        np.prod(
          [leaf.shape[a] if a < leaf.ndim else bits.shape[a] for a in range(axis + 1, bits.ndim)]
        )
      )
      sums = bits.sum(axis=others, dtype=np.uint64)
      weighted += stride * int((sums * index).sum(dtype=np.uint64))
  return total % _WRAP, weighted % _WRAP, bad


def _is_finite(values: np.ndarray) -> bool:
  """Returns whether all numbers are finite, without an array of as many truth values."""
  flat = values.reshape(-1)
  return all(
    np.isfinite(flat[start : start + _BLOCK]).all() for start in range(0, flat.size, _BLOCK)
  )


def _shards(leaf: Array | np.ndarray) -> Iterator[tuple[np.ndarray, list[int]]]:
  """Yields this process's shards of an array, each with the index at which it begins.

  Each element belongs to exactly one shard over all processes, because replicas are left out. The
  index has a 0 more than the array has axes, which is for the axis that `_bits` may add.
  """
  if isinstance(leaf, np.ndarray):
    yield leaf, [0] * (leaf.ndim + 1)
    return
  for shard in leaf.addressable_shards:
    if shard.replica_id == 0:
      yield np.asarray(shard.data), [part.start or 0 for part in shard.index] + [0]


def _bits(values: np.ndarray) -> np.ndarray:
  """Returns the elements' bits as unsigned integers of up to 32 bits.

  An element of 64 bits becomes two integers on a new last axis.
  """
  width = min(values.dtype.itemsize, 4)
  words = np.ascontiguousarray(values)[..., None].view(f"u{width}")
  return words if values.dtype.itemsize > 4 else words[..., 0]


def _over_processes(table: np.ndarray) -> np.ndarray:
  """Returns the sum, modulo 2^64, of the uint64 tables of all processes."""
  if jax.process_count() == 1:
    return table
  from jax.experimental import multihost_utils

  # Each uint64 is sent as two uint32, because JAX would truncate it to 32 bits.
  halves = np.ascontiguousarray(table).view(np.uint32)
  return (
    np.ascontiguousarray(multihost_utils.process_allgather(halves))
    .view(np.uint64)
    .sum(axis=0, dtype=np.uint64)
  )
