"""Which rows of the global batch this process reads, and what is in a row."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Int32, Integer

from moe_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Rows:
  """Rows `[first, first + size)` of global batches of `batch_size` rows."""

  first: int
  size: int
  batch_size: int

  def index(self, i: int) -> int:
    """The position, in the endless sequence of all rows of all batches, of this process's i-th
    row."""
    step, row = divmod(i, self.size)
    return step * self.batch_size + self.first + row


def process_rows(
  batch_size: int, process_index: int | None = None, process_count: int | None = None
) -> Rows:
  """The contiguous block of rows of one process.

  Raises:
    ConfigError: `batch_size` is not a positive multiple of the number of processes.
  """
  if process_index is None or process_count is None:
    # asking for the process starts JAX's backend: only when nobody said which process this is
    import jax

    process_index = jax.process_index() if process_index is None else process_index
    process_count = jax.process_count() if process_count is None else process_count
  if batch_size < 1 or batch_size % process_count:
    above = max(1, -(-batch_size // process_count)) * process_count
    raise ConfigError(
      "train.batch_size",
      batch_size,
      f"must be a positive multiple of the {process_count} processes, e.g. {above}",
    )
  size = batch_size // process_count
  return Rows(process_index * size, size, batch_size)


def batch(
  tokens: Integer[np.ndarray, "b W"], boundary: int, valid: Integer[np.ndarray, " b"] | None = None
) -> dict[str, Int32[np.ndarray, "b L"]]:
  """`tokens` [b, W = L + 1] -> inputs, targets, segment_ids, positions, each int32 [b, L].

  Args:
    tokens: consecutive tokens; the last one is only a target.
    boundary: the id that starts a document.
    valid: [b] number of real targets of each row; what follows is padding. None = all.
  """
  inputs, targets = tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32)
  column = np.arange(inputs.shape[1], dtype=np.int32)[None]
  starts = inputs == boundary
  segments = np.cumsum(starts, axis=1, dtype=np.int32)
  segments += 1 - segments[:, :1]
  positions = column - np.maximum.accumulate(np.where(starts, column, 0), axis=1)
  out = {
    "inputs": inputs,
    "targets": targets,
    "segment_ids": segments,
    "positions": positions.astype(np.int32),
  }
  if valid is None:
    return out
  return {name: np.where(column < valid[:, None], x, 0).astype(np.int32) for name, x in out.items()}
