"""Displays of curves that follow a run: TensorBoard always, Weights & Biases if asked for.

`metrics.jsonl` is the record of a run. A board shows the same numbers while it trains.
"""

from __future__ import annotations

import pathlib
import time
import uuid
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from moe_jax.errors import ConfigError, shorten
from moe_jax.training import workdir

FLUSH_SECONDS = 10.0  # after which the newest points are visible to TensorBoard
TRACKERS = ("wandb",)  # the values of --tracker


@runtime_checkable
class Board(Protocol):
  """What receives the points of all curves."""

  def write(self, step: int, points: Mapping[str, float]) -> None:
    """Adds the point (`step`, value) to each of the curves."""

  def close(self) -> None:
    """Writes what is not written yet, and ends."""


class TensorBoard:
  """Writes scalars for TensorBoard.

  `tensorboardX.SummaryWriter` hands events to a thread. If the disk is full, this thread ends, and
  the next event blocks the training loop for ever, because nobody empties the queue any more. Here
  the loop writes the events itself, so that it gets the error.
  """

  def __init__(self, folder: pathlib.Path, first_step: int):
    """Opens a new file of events, which replaces all older events from `first_step` on."""
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2

    folder.mkdir(parents=True, exist_ok=True)
    messages: Any = event_pb2  # its classes are made when it is imported
    self._event = messages.Event
    self._events = EventsWriter(str(folder / "events"))
    start = messages.SessionLog(status=messages.SessionLog.START)
    self._write(first_step, session_log=start)
    self._events.flush()
    self._flushed = time.monotonic()

  def write(self, step: int, points: Mapping[str, float]) -> None:
    """Adds the point (`step`, value) to each of the curves."""
    from tensorboardX.summary import scalar

    for name, value in points.items():
      self._write(step, summary=scalar(name, value))
    if time.monotonic() - self._flushed > FLUSH_SECONDS:
      self._events.flush()
      self._flushed = time.monotonic()

  def close(self) -> None:
    """Closes the file."""
    self._events.close()

  def _write(self, step: int, **content: Any) -> None:
    """Writes an event of a step."""
    self._events.write_event(self._event(wall_time=time.time(), step=step, **content))


class Wandb:
  """Sends scalars to Weights & Biases.

  The same workdir is the same run there, also after a restart. Points that a restart or a rollback
  repeats are sent again, and the newer one of a step is what the curves end with.
  """

  def __init__(self, directory: pathlib.Path, config: Mapping[str, Any]):
    """Opens the run of this workdir, or makes one.

    Args:
      directory: The workdir. The file `wandb_run` in it holds the run's id there.
      config: What the run's page shows as its config.

    Raises:
      ConfigError: If the package is not installed, or if the service refuses the run.
    """
    try:
      import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
      raise ConfigError(
        "tracker", "wandb", "is not installed; install it with: pip install wandb"
      ) from error
    file = directory / "wandb_run"
    if not file.exists():
      workdir.write_atomically(file, uuid.uuid4().hex[:8] + "\n")
    try:
      self._run = wandb.init(
        project="moe_jax",
        name=directory.resolve().name,
        id=file.read_text().strip(),
        resume="allow",
        dir=str(directory),
        config=dict(config),
      )
    except wandb.Error as error:
      reason = shorten(" ".join(str(error).split())).rstrip(".")
      raise ConfigError(
        "tracker",
        "wandb",
        f"{reason}; log in with: wandb login; or keep the run on this machine with the environment "
        "variable WANDB_MODE=offline",
      ) from error
    # Without an axis of its own, points whose step is not above the last one would be refused.
    self._run.define_metric("step")
    self._run.define_metric("*", step_metric="step")

  def write(self, step: int, points: Mapping[str, float]) -> None:
    """Adds the point (`step`, value) to each of the curves."""
    self._run.log({"step": step} | dict(points))

  def close(self) -> None:
    """Sends what is not sent yet."""
    self._run.finish()
