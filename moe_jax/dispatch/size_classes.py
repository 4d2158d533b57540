"""Static chunk sizes for ragged groups, and the layout of the experts' rows in memory.

The rows of each expert are cut into chunks of one of a few static sizes, so that a program with few
compiled shapes can process any load.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int

# The chunk sizes as multiples of the balanced load. There are six steps per octave near 1, so that
# a typical load fits one chunk, or two equal ones, with about 5 % of padding. Steps are coarser for
# small loads, because small experts are a small part of the work. `most_rows` is the bound on the
# padding.
_STEPS = (1.122, 1.0, 0.891, 0.794, 0.707, 0.63, 0.561, 0.5, 0.354, 0.25, 0.125)
_MULTIPLE = 16  # all sizes except for the smallest are multiples of it
_SMALLEST = 8
# The fixed cost of a chunk, which is the addition of its weight gradients, as the number of rows
# whose matmuls take as long.
_CHUNK_COST = 24

Loads = typing.TypeVar("Loads", Int[Array, "*E"], Int[np.ndarray, "*E"])


def size_classes(rows: int, experts: int, steps: Sequence[float] = _STEPS) -> tuple[int, ...]:
  """Returns the chunk sizes, in ascending order, for `rows` assignments to `experts` experts.

  Args:
    rows: The number of assignments.
    experts: The number of experts.
    steps: The sizes as multiples of the balanced load. Each size is a loop to compile.
  """
  sizes = {_MULTIPLE * round(rows * step / experts / _MULTIPLE) for step in steps}
  return tuple(sorted({max(size, _SMALLEST) for size in (*sizes, 0)}))


def cut(load: Loads, classes: tuple[int, ...], xp=jnp) -> tuple[Loads, Loads]:
  """Returns the size class and the number of chunks into which each load is cut.

  The choice minimises the cost of padded rows and of chunks.

  Args:
    load: The number of rows of each expert.
    classes: The chunk sizes.
    xp: The array module, `jax.numpy` or `numpy`.

  Returns:
    (choice, chunks): the index of the size class and the number of chunks of each expert.
  """
  sizes = xp.asarray(classes)
  chunks = -(-load[..., None] // sizes)
  choice = xp.argmin(chunks * (sizes + _CHUNK_COST), axis=-1)
  return choice, xp.take_along_axis(chunks, choice[..., None], axis=-1)[..., 0]


def most_rows(rows: int, experts: int) -> int:
  """Returns a static bound on the number of rows that are computed for `rows` assignments.

  It holds for every distribution of the assignments over `experts` experts. Let padded(n) be the
  number of rows that are computed for a load of n. Then for every price l,

      sum_e padded(n_e) = l * sum_e n_e + sum_e (padded(n_e) - l n_e)
                       <= l * rows + E * max_n (padded(n) - l n).

  The bound is the minimum of the right-hand side over some prices between 1 and 2.
  """
  classes, load = size_classes(rows, experts), np.arange(rows + 1)
  choice, chunks = cut(load, classes, np)
  padded = chunks * np.asarray(classes)[choice]
  return min(
    int(price * rows + experts * np.max(padded - price * load)) for price in np.linspace(1, 2, 51)
  )


# JAX rebuilds pytrees with placeholder leaves that are not arrays, so the checks of shapes at run
# time are switched off for this class.
@typing.no_type_check
class Layout(struct.PyTreeNode):
  """The positions of the experts' rows in memory.

  The rows of expert e are [first[e], first[e] + load[e]). They are cut into chunks[e] chunks of the
  size class of e.

  Experts are sorted by size class and stored without gaps. The last chunk of an expert may extend
  into the rows of the experts after it, and that of the last expert into classes[-1] spare rows at
  the end. Chunks must therefore be written in order, so that later chunks overwrite the excess rows
  of earlier ones.

  Attributes:
    load: The number of rows of each expert.
    first: The first row of each expert.
    chunks: The number of chunks of each expert.
    order: The experts in the order in which they are stored.
    bounds: The bounds of the size classes in `order`. The experts of class m are order[bounds[m] :
      bounds[m + 1]]. The experts before bounds[0] have no rows.
    classes: The M chunk sizes, in ascending order.
  """

  load: Int[Array, "E"]
  first: Int[Array, "E"]
  chunks: Int[Array, "E"]
  order: Int[Array, "E"]
  bounds: Int[Array, "M+1"]
  classes: tuple[int, ...] = struct.field(pytree_node=False)

  def trips(self) -> dict[str, int | float]:
    """Returns the number of iterations of each loop of `chunks.apply_chunks` by its name.

    "experts_of_{size}" is the number of experts of a class and "chunks_of_{size}" is the mean
    number of chunks of one of these experts.
    """
    bounds, chunks, trips = (
      np.asarray(self.bounds),
      np.asarray(self.chunks)[np.asarray(self.order)],
      {},
    )
    for m, size in enumerate(self.classes):
      class_chunks = chunks[bounds[m] : bounds[m + 1]]
      trips |= {
        f"experts_of_{size}": class_chunks.size,
        f"chunks_of_{size}": float(class_chunks.mean()) if class_chunks.size else 0,
      }
    return trips


def layout(load: Int[Array, "E"], rows: int, steps: Sequence[float] = _STEPS) -> Layout:
  """Cuts the rows of each expert into chunks of one class and returns their layout.

  Args:
    load: The number of rows of each expert.
    rows: An upper bound on the sum of `load`, which determines the chunk sizes.
    steps: See `size_classes`.
  """
  classes = size_classes(rows, load.shape[0], steps)
  choice, chunks = cut(load, classes)
  # Experts without rows come first in the order and belong to no class.
  choice = jnp.where(load == 0, -1, choice)
  order = jnp.argsort(choice)
  end = jnp.cumsum(load[order])
  first = (
    jnp.zeros_like(load).at[order].set((end - load[order]).astype(load.dtype), unique_indices=True)
  )
  bounds = jnp.sum(choice[:, None] < jnp.arange(len(classes) + 1), axis=0)
  return Layout(load=load, first=first, chunks=chunks, order=order, bounds=bounds, classes=classes)
