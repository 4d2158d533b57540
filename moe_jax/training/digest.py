"""A digest of every array of a state, and which arrays hold numbers that are not finite.

Neither depends on the mesh, so that a digest that is stored with a checkpoint can be compared after
the checkpoint was restored on other devices. Each process reads only its own shards.
"""

from __future__ import annotations

import concurrent.futures
import os
import typing
from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import Array, PyTree

_WRAP = 2**64


class Examination(typing.NamedTuple):
  """What `examine` found.

  Attributes:
    digests: path of an array, such as "params/embedding" -> 32 hexadecimal digits.
    nonfinite: the paths of the arrays that hold a NaN or an infinity, in the order of the tree.
  """

  digests: dict[str, str]
  nonfinite: list[str]


def examine(tree: PyTree) -> Examination:
  """Digests of all arrays of `tree`, and the paths of those whose numbers are not all finite.

  A digest is that of Fletcher: the sum of the elements' bits, and the sum of each element's bits
  times its place in row-major order, both modulo 2^64. Such sums are exact in any order, so that
  every mesh gives the same ones. Each change of a single element changes the first sum; elements
  that change places change the second one. It is meant for damage on the way to a disk and back,
  and is no defence against somebody who forges a checkpoint.
  """
  named = paths(tree)
  with concurrent.futures.ThreadPoolExecutor(
    os.cpu_count()
  ) as pool:  # NumPy's reductions release the GIL
    found = list(pool.map(_examine, named.values()))
  sums = _over_processes(np.array([one[:2] for one in found], np.uint64).reshape(-1, 2))
  bad = _over_processes(np.array([one[2] for one in found], np.uint64))
  digests = {
    name: f"{total:016x}{placed:016x}"
    for name, (total, placed) in zip(named, sums.tolist(), strict=True)
  }
  return Examination(
    digests, [name for name, count in zip(named, bad.tolist(), strict=True) if count]
  )


def paths(tree: PyTree) -> dict[str, Array | np.ndarray]:
  """The arrays of `tree` by their paths, such as "params/layer_0/ffn/up", in the order of
  `jax.tree.leaves`."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _examine(leaf: Array | np.ndarray) -> tuple[int, int, int]:
  """(sum of bits, sum of bits times place, number of shards with numbers that are not finite) of
  this process."""
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  total = placed = bad = 0
  for values, first in _shards(leaf):
    bad += int(jax.dtypes.issubdtype(values.dtype, np.inexact) and not np.isfinite(values).all())
    bits = _bits(values)
    total += int(bits.sum(dtype=np.uint64))
    for axis in range(bits.ndim):
      # An element's place is the sum over axes of its index times the axis' stride, so that sums
      # over the other axes suffice, and no array of places is needed.
      others = tuple(a for a in range(bits.ndim) if a != axis)
      index = first[axis] + np.arange(bits.shape[axis], dtype=np.uint64)
      stride = int(
        np.prod(
          [leaf.shape[a] if a < leaf.ndim else bits.shape[a] for a in range(axis + 1, bits.ndim)]
        )
      )
      placed += stride * int((bits.sum(axis=others, dtype=np.uint64) * index).sum(dtype=np.uint64))
  return total % _WRAP, placed % _WRAP, bad


def _shards(leaf: Array | np.ndarray) -> Iterator[tuple[np.ndarray, list[int]]]:
  """This process's parts of an array, each element once over all processes, with the index at which
  each begins."""
  if isinstance(leaf, np.ndarray):
    yield leaf, [0] * (leaf.ndim + 1)
    return
  for shard in leaf.addressable_shards:
    if shard.replica_id == 0:
      yield np.asarray(shard.data), [part.start or 0 for part in shard.index] + [0]


def _bits(values: np.ndarray) -> np.ndarray:
  """The elements' bits as unsigned integers of up to 32 bits; an element of 64 bits becomes two, on
  a new last axis."""
  width = min(values.dtype.itemsize, 4)
  words = np.ascontiguousarray(values)[..., None].view(f"u{width}")
  return words if values.dtype.itemsize > 4 else words[..., 0]


def _over_processes(table: np.ndarray) -> np.ndarray:
  """The sum, modulo 2^64, of every process's uint64 table."""
  if jax.process_count() == 1:
    return table
  from jax.experimental import multihost_utils

  halves = np.ascontiguousarray(table).view(np.uint32)  # JAX would cut 64 bits to 32
  return (
    np.ascontiguousarray(multihost_utils.process_allgather(halves))
    .view(np.uint64)
    .sum(axis=0, dtype=np.uint64)
  )
