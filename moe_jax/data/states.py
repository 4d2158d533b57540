"""Validates the positions in the data that a checkpoint stores, before training resumes there."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int64

from moe_jax.data.mixture import Stretch
from moe_jax.errors import ConfigError

_PIPELINES = ("windows", "stream")
# An upper bound on the number of batches, documents and tokens. It is more than any run reads, and
# its product with the number of rows of a batch still fits into int64.
_MOST = 2**48


def batches_of(state: Any) -> int | None:
  """Returns the number of batches that were read before this position.

  This is the number of training steps if each step reads one batch.

  Args:
    state: What `get_state` of a `train_iterator` returned.

  Returns:
    The number of batches, or None for a state of pipeline `stream` that does not contain it because
    it was saved by an earlier version.

  Raises:
    ConfigError: If `state` is not a valid position. The field of the error is "checkpoint".
  """
  pipeline = _pipeline(state)
  if pipeline == "stream" and "batches" not in state:
    return None
  return _count(state.get("batches"), "number of batches")


def windows(state: Any) -> int:
  """Returns the number of batches in a state of pipeline `windows`.

  Raises:
    ConfigError: If `state` is not valid, or if it is one of another pipeline.
  """
  _expect("windows", state)
  return _count(state.get("batches"), "number of batches")


def stretch(state: Any, num_sources: int) -> Stretch | None:
  """Returns the stretch of the data in a state of pipeline `windows`.

  Args:
    state: What `get_state` of the iterator returned.
    num_sources: The number of sources.

  Returns:
    The stretch, or None if the shares of the sources are still those of the first batch.

  Raises:
    ConfigError: If `state` is not valid, or if it is one of another pipeline.
  """
  batches = windows(state)
  if "stretch" not in state:
    return None
  saved = state["stretch"] if isinstance(state["stretch"], dict) else {}
  shares, read = saved.get("shares"), saved.get("read")
  if not (
    isinstance(shares, list) and isinstance(read, list) and len(shares) == len(read) == num_sources
  ):
    raise _wrong(f"lacks the share and the place of each of the {num_sources} sources")
  # A share of 0 is that of a source that is only evaluated, so that one of them must be above 0.
  if not all(type(share) is float and 0 <= share <= 1 for share in shares) or not any(shares):
    raise _wrong(f"has the shares {shares!r} of the sources")
  start = _count(saved.get("start"), "number of batches before the shares")
  if start > batches:
    raise _wrong(f"has shares since batch {start}, and only {batches} batches")
  for count in read:
    _count(count, "number of records of a source")
  return Stretch(tuple(shares), start, tuple(read))


def stream(state: Any, batch_size: int) -> tuple[Int64[np.ndarray, "B 2"], int | None]:
  """Returns the position of each row in a state of pipeline `stream`, and the number of batches.

  Args:
    state: What `get_state` of the iterator returned.
    batch_size: Number of rows of the global batch.

  Returns:
    [B, 2] The (document, offset) of each row of the global batch, and the number of batches (see
    `batches_of`).

  Raises:
    ConfigError: If `state` is not valid, or if it is one of another pipeline or batch size.
  """
  _expect("stream", state)
  if _count(state.get("batch_size"), "batch size") != batch_size:
    raise ConfigError(
      "train.batch_size",
      batch_size,
      "the saved position is that of a run with batches of "
      f"{state['batch_size']} rows; pipeline stream can only resume with the same batch size",
    )
  rows = state.get("rows")
  if not isinstance(rows, dict) or set(rows) != set(map(str, range(batch_size))):
    raise _wrong(f"has no position for each of the {batch_size} rows of a batch")
  for row, place in rows.items():
    if not isinstance(place, list | tuple) or len(place) != 2:
      raise _wrong(f"has for row {row} the position {place!r} in place of [document, offset]")
    for number, what in zip(place, ("document", "offset"), strict=True):
      _count(number, f"{what} of row {row}")
  return np.array([rows[str(r)] for r in range(batch_size)], np.int64), batches_of(state)


def _pipeline(state: Any) -> str:
  """Returns the name of the pipeline of `state`, or raises ConfigError if it has none."""
  if not isinstance(state, dict) or state.get("pipeline") not in _PIPELINES:
    raise _wrong("is not one of pipeline windows or stream")
  return state["pipeline"]


def _expect(pipeline: str, state: Any) -> None:
  """Raises ConfigError if `state` is not one of this pipeline."""
  saved_pipeline = _pipeline(state)
  if saved_pipeline != pipeline:
    raise ConfigError(
      "data.pipeline",
      pipeline,
      f"the saved position is that of pipeline {saved_pipeline!r}; "
      f"set --config.data.pipeline={saved_pipeline}",
    )


def _count(value: Any, what: str) -> int:
  """Returns `value` if it is a count, or raises ConfigError, in which `what` names the value."""
  # `isinstance` would accept bool, which is a subclass of int.
  if type(value) is not int or not 0 <= value < _MOST:
    raise _wrong(f"has the {what} {value!r}, which must be an integer of at least 0")
  return value


def _wrong(what: str) -> ConfigError:
  """Returns the error for a damaged position; `what` continues "the saved position in the data"."""
  return ConfigError(
    "checkpoint",
    "data position",
    f"the saved position in the data {what}; the checkpoint is "
    "damaged: resume from another one, or begin a new run in another --workdir",
  )
