"""Positions in the data as a checkpoint stores them, checked before anything continues from
them."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int64

from moe_jax.errors import ConfigError

_PIPELINES = ("windows", "stream")
_MOST = (
  2**48
  # batches, documents or tokens; more than any run reads, and products with a batch's rows stay in
  # int64
)


def batches_of(state: Any) -> int | None:
  """The batches that were read before this position: training steps, where each step reads one.

  Args:
    state: what `get_state` of a `train_iterator` returned.

  Returns:
    None for pipeline `stream` where the state was saved before it held that number.

  Raises:
    ConfigError: not a position, told as field "checkpoint".
  """
  pipeline = _pipeline(state)
  if pipeline == "stream" and "batches" not in state:
    return None
  return _count(state.get("batches"), "number of batches")


def windows(state: Any) -> int:
  """The number of batches in a state of pipeline `windows`.

  Raises:
    ConfigError: the state of another pipeline, or no state.
  """
  _expect("windows", state)
  return _count(state.get("batches"), "number of batches")


def stream(state: Any, batch_size: int) -> tuple[Int64[np.ndarray, "B 2"], int | None]:
  """The (document, offset) of each row of the global batch in a state of pipeline `stream`, and the
  number of batches.

  Raises:
    ConfigError: the state of another pipeline or batch size, or no state.
  """
  _expect("stream", state)
  if _count(state.get("batch_size"), "batch size") != batch_size:
    raise ConfigError(
      "train.batch_size",
      batch_size,
      "the saved position is one of rows of batches of "
      f"{state['batch_size']}; pipeline stream resumes with the same batch size only",
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
  if not isinstance(state, dict) or state.get("pipeline") not in _PIPELINES:
    raise _wrong("is not one of pipeline windows or stream")
  return state["pipeline"]


def _expect(pipeline: str, state: Any) -> None:
  found = _pipeline(state)
  if found != pipeline:
    raise ConfigError(
      "data.pipeline",
      pipeline,
      f"the saved position is one of pipeline {found!r}; set --config.data.pipeline={found}",
    )


def _count(value: Any, what: str) -> int:
  if type(value) is not int or not 0 <= value < _MOST:  # bool is an int, and no count
    raise _wrong(f"has the {what} {value!r}, which must be an integer from 0 on")
  return value


def _wrong(what: str) -> ConfigError:
  return ConfigError(
    "checkpoint",
    "data position",
    f"the saved position in the data {what}; the checkpoint is "
    "damaged: resume from another one, or begin a new run in another --workdir",
  )
