"""How the tensors of a published checkpoint become weights of this package, and back.

A family's map is a list of `Row`s. Their names are those of an unrolled model, in which each layer
has weights of its own (`unrolled.py`). In names, `{l}` stands for a layer and `{e}` for an expert.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Op:
  """An operation on tensors with an exact inverse.

  Attributes:
    split: One tensor of theirs -> our weights, of which there may be several.
    join: These weights -> the tensor. It is the inverse of `split`.
    shape: The shapes of our weights -> the shape of the tensor.
  """

  split: Callable[[np.ndarray], tuple[np.ndarray, ...]]
  join: Callable[..., np.ndarray]
  shape: Callable[..., Shape]


@dataclasses.dataclass(frozen=True)
class Row:
  """One tensor of each layer, or of each expert of each layer, or of the whole model.

  Attributes:
    theirs: The name of the tensor. If it has `{e}`, there is one tensor for each expert, and our
      weight has the experts as its first axis.
    ours: The unrolled names of the weights that it makes, one for each result of `op.split`.
    op: The operation between them.
    experts: Whether the row is for layers with experts (True) or without (False); None means both.
  """

  theirs: str
  ours: str | tuple[str, ...]
  op: Op
  experts: bool | None = None


class Binding(NamedTuple):
  """A row for one layer and one expert.

  Attributes:
    theirs: The name of the tensor.
    ours: The unrolled names of our weights.
    op: The operation between them.
    expert: The index into the first axis of our weights; None means all of them.
  """

  theirs: str
  ours: tuple[str, ...]
  op: Op
  expert: int | None


def bindings(
  rows: Sequence[Row], layers: Mapping[str, Sequence[bool]], num_experts: int
) -> Iterator[Binding]:
  """Yields the rows for all layers and experts.

  Args:
    rows: The map of a family.
    layers: Name of a stack of layers, such as "encoder/" or "", by which the unrolled names of its
      layers begin -> for each of its layers, whether it has experts.
    num_experts: The number of experts of a layer.
  """
  for row in rows:
    ours = (row.ours,) if isinstance(row.ours, str) else row.ours
    chosen = [0]
    if "{l}" in ours[0]:
      stack = next(name for name in layers if ours[0].startswith(name))
      chosen = [i for i, has in enumerate(layers[stack]) if row.experts in (None, has)]
    for i in chosen:
      for e in range(num_experts) if "{e}" in row.theirs else [None]:
        yield Binding(
          row.theirs.format(l=i, e=e), tuple(name.format(l=i) for name in ours), row.op, e
        )


def _same(array: np.ndarray) -> tuple[np.ndarray, ...]:
  return (array,)


def _transposed(array: np.ndarray) -> np.ndarray:
  return np.swapaxes(array, -1, -2)


# A norm, an embedding, or a bias: nothing changes.
SAME = Op(_same, lambda array: array, lambda shape: shape)
# A matrix [out, in], or a stack of them, which is [in, out] here.
TRANSPOSE = Op(
  lambda array: (_transposed(array),), _transposed, lambda shape: (*shape[:-2], *shape[:-3:-1])
)


def heads_in(heads: int) -> Op:
  """Returns the operation from [H*P, D] to [D, H, P], a projection to heads."""

  def split(array):
    return (np.moveaxis(array.reshape(heads, -1, array.shape[-1]), -1, 0),)

  def join(weight):
    return np.moveaxis(weight, 0, -1).reshape(-1, weight.shape[0])

  return Op(split, join, lambda shape: (shape[1] * shape[2], shape[0]))


def heads_out(heads: int) -> Op:
  """Returns the operation from [D, H*P] to [H, P, D], a projection from heads."""

  def split(array):
    return (np.moveaxis(array.reshape(array.shape[0], heads, -1), 0, -1),)

  def join(weight):
    return np.moveaxis(weight, -1, 0).reshape(weight.shape[-1], -1)

  return Op(split, join, lambda shape: (shape[2], shape[0] * shape[1]))


def heads_bias(heads: int) -> Op:
  """Returns the operation from [H*P] to [H, P], the bias of a projection to heads."""
  return Op(
    lambda array: (array.reshape(heads, -1),),
    lambda weight: weight.reshape(-1),
    lambda shape: (shape[0] * shape[1],),
  )


def parts(op: Op, sizes: Sequence[int], axis: int) -> Op:
  """Returns the operation that cuts the result of `op` into several weights along an axis.

  Args:
    op: An operation with one weight.
    sizes: The size of each part along the axis. The parts fill it.
    axis: The axis, counted from the end: below 0.
  """
  edges = np.cumsum(sizes)[:-1].tolist()

  def split(array):
    return tuple(np.split(op.split(array)[0], edges, axis=axis))

  def join(*weights):
    return op.join(np.concatenate(weights, axis=axis))

  def shape(*shapes):
    whole = list(shapes[0])
    # The sizes, and not the shapes, say how large the tensor is, so that a part of a wrong size
    # shows.
    whole[axis] = sum(sizes)
    return op.shape(tuple(whole))

  return Op(split, join, shape)


def halves(op: Op, size: int) -> Op:
  """Returns `op` followed by the change from interleaved to half-split rotary features.

  DeepSeek rotates the features (2i, 2i + 1) of a head, where this package rotates (i, i + R/2); see
  `LatentAttention`.

  Args:
    op: An operation with one weight.
    size: R, the number of features at the end of the weight's last axis that are rotated.
  """
  order = np.arange(size).reshape(-1, 2).T.reshape(-1)
  back = np.argsort(order)

  def permuted(weight, permutation):
    kept = np.arange(weight.shape[-1] - size)
    return weight[..., np.concatenate([kept, len(kept) + permutation])]

  def split(array):
    return (permuted(op.split(array)[0], order),)

  return Op(split, lambda weight: op.join(permuted(weight, back)), op.shape)


def experts_flat(num_experts: int, op: Op) -> Op:
  """Returns the operation from [E*F, D] to the stack of what `op` makes of each [F, D] (DBRX).

  Args:
    num_experts: The number of experts E.
    op: `SAME` or `TRANSPOSE`.
  """

  def split(array):
    return op.split(array.reshape(num_experts, -1, array.shape[-1]))

  def join(weight):
    array = op.join(weight)
    return array.reshape(-1, array.shape[-1])

  def shape(ours):
    experts, *matrix = op.shape(ours)
    return math.prod([experts, *matrix[:-1]]), matrix[-1]

  return Op(split, join, shape)
