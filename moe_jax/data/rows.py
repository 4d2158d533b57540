"""The rows of the global batch that a process reads, and the arrays that make up a batch."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Int32, Integer

from moe_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Rows:
  """The rows `[first, first + size)` of every global batch of `batch_size` rows."""

  first: int
  size: int
  batch_size: int

  def index(self, i: int) -> int:
    """Returns the index of this process's i-th row in the endless sequence of all batches' rows."""
    step, row = divmod(i, self.size)
    return step * self.batch_size + self.first + row


def process_rows(
  batch_size: int, process_index: int | None = None, process_count: int | None = None
) -> Rows:
  """Returns the contiguous block of rows of one process.

  Args:
    batch_size: Number of rows of the global batch.
    process_index: The process. None means JAX's process index.
    process_count: The number of processes. None means JAX's process count.

  Raises:
    ConfigError: If `batch_size` is not a positive multiple of the number of processes.
  """
  if process_index is None or process_count is None:
    # Asking JAX for the process starts its backend, so this happens only if it is necessary.
    import jax

    process_index = jax.process_index() if process_index is None else process_index
    process_count = jax.process_count() if process_count is None else process_count
  if batch_size < 1 or batch_size % process_count:
    next_multiple = max(1, -(-batch_size // process_count)) * process_count
    raise ConfigError(
      "train.batch_size",
      batch_size,
      f"must be a positive multiple of the {process_count} processes, e.g. {next_multiple}",
    )
  size = batch_size // process_count
  return Rows(process_index * size, size, batch_size)


def batch(
  tokens: Integer[np.ndarray, "b W"], boundary: int, valid: Integer[np.ndarray, " b"] | None = None
) -> dict[str, Int32[np.ndarray, "b L"]]:
  """Returns the inputs, targets, segment_ids and positions of rows of tokens.

  Args:
    tokens: [b, W = L + 1] Consecutive tokens. The last one of a row is only a target.
    boundary: The id that starts a document.
    valid: [b] The number of real targets of each row. Everything after them is padding and becomes
      0. None means that all targets are real.

  Returns:
    Four arrays, each int32 [b, L].
  """
  inputs, targets = tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32)
  column = np.arange(inputs.shape[1], dtype=np.int32)[None]
  starts = inputs == boundary
  segments = np.cumsum(starts, axis=1, dtype=np.int32)
  # The first segment of a row is 1, whether or not the row starts with a boundary.
  segments += 1 - segments[:, :1]
  # The running maximum is the column at which the current document starts.
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
