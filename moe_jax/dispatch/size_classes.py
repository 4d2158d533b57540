"""Ragged groups in few compiled shapes: into chunks of which static sizes experts' rows are cut,
and where they lie."""

from __future__ import annotations

import typing

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int

# Multiples of the balanced load: six steps an octave around it, so that a usual load fits one
# chunk, or two equal ones, with about 5 % to spare; coarser below, because small experts are a
# small part of the work. `most_rows` is the bound.
_STEPS = (1.122, 1.0, 0.891, 0.794, 0.707, 0.63, 0.561, 0.5, 0.354, 0.25, 0.125)
_MULTIPLE = 16  # of which all sizes are, but for the smallest
_SMALLEST = 8
_CHUNK_COST = (
  24  # rows whose matmuls take as long as a chunk's own cost: adding up its weight gradients
)

Loads = Int[Array, "*E"] | Int[np.ndarray, "*E"]


def size_classes(rows: int, experts: int) -> tuple[int, ...]:
  """Chunk sizes, ascending, for `rows` assignments over `experts`."""
  sizes = {_MULTIPLE * round(rows * step / experts / _MULTIPLE) for step in _STEPS}
  return tuple(sorted({max(size, _SMALLEST) for size in (*sizes, 0)}))


def cut(load: Loads, classes: tuple[int, ...], xp=jnp) -> tuple[Loads, Loads]:
  """Into chunks of which class, and how many, each load is cut: the cheapest, counting padded rows
  and chunks."""
  sizes = xp.asarray(classes)
  chunks = -(-load[..., None] // sizes)
  choice = xp.argmin(chunks * (sizes + _CHUNK_COST), axis=-1)
  return choice, xp.take_along_axis(chunks, choice[..., None], axis=-1)[..., 0]


def most_rows(rows: int, experts: int) -> int:
  """A static bound on the rows that are computed for `rows` assignments, whatever their
  distribution over `experts`.

  With padded(n) the rows computed for a load of n: for every price l, sum_e padded(n_e) = l * sum_e
  n_e + sum_e (padded(n_e) - l n_e) <= l * rows + E * max_n (padded(n) - l n).
  """
  classes, load = size_classes(rows, experts), np.arange(rows + 1)
  choice, chunks = cut(load, classes, np)
  padded = chunks * np.asarray(classes)[choice]
  return min(
    int(price * rows + experts * np.max(padded - price * load)) for price in np.linspace(1, 2, 51)
  )


@typing.no_type_check
@struct.dataclass
class Layout:
  """Where the experts' rows lie. Expert e's are [first[e], first[e] + load[e]), cut into chunks[e]
  chunks of its class.

  Experts lie in `order`, by class, without gaps: order[bounds[m] : bounds[m + 1]] are those of
  class m, and those before bounds[0] have no rows. An expert's last chunk runs over into the rows
  of those after it, the very last into classes[-1] spare rows at the end; chunks that are written
  in order repair what earlier ones wrote too much.
  """

  load: Int[Array, "E"]  # rows
  first: Int[Array, "E"]  # row
  chunks: Int[Array, "E"]
  order: Int[Array, "E"]
  bounds: Int[Array, "M+1"]
  classes: tuple[int, ...] = struct.field(pytree_node=False)

  def trips(self) -> dict[str, int | float]:
    """How often each loop runs, by its name: the experts of a class, and on average the chunks of
    one of those."""
    bounds, chunks, trips = (
      np.asarray(self.bounds),
      np.asarray(self.chunks)[np.asarray(self.order)],
      {},
    )
    for m, size in enumerate(self.classes):
      mine = chunks[bounds[m] : bounds[m + 1]]
      trips |= {
        f"experts_of_{size}": mine.size,
        f"chunks_of_{size}": float(mine.mean()) if mine.size else 0,
      }
    return trips


def layout(load: Int[Array, "E"], rows: int) -> Layout:
  """Cuts each expert's `load` (at most `rows` in all) into equal chunks of one class."""
  classes = size_classes(rows, load.shape[0])
  choice, chunks = cut(load, classes)
  choice = jnp.where(load == 0, -1, choice)
  order = jnp.argsort(choice)
  end = jnp.cumsum(load[order])
  first = (
    jnp.zeros_like(load).at[order].set((end - load[order]).astype(load.dtype), unique_indices=True)
  )
  bounds = jnp.sum(choice[:, None] < jnp.arange(len(classes) + 1), axis=0)
  return Layout(load=load, first=first, chunks=chunks, order=order, bounds=bounds, classes=classes)
