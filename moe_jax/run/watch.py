"""Ways to watch a run beside its files: a tracker, and a profile of some steps."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from moe_jax.training.boards import Board, Wandb

WARM = 3  # The first steps of a start, which compile and fill buffers and are not profiled.


@dataclasses.dataclass(frozen=True)
class Watch:
  """What the command asks for.

  Attributes:
    tracker: One of `boards.TRACKERS`, or "" for none.
    profile: The number of steps to profile; 0 means none.
  """

  tracker: str = ""
  profile: int = 0

  def boards(self, directory: pathlib.Path, config: Mapping[str, Any]) -> list[Board]:
    """Opens the boards that are not always there.

    Args:
      directory: The workdir.
      config: The config of the run, as nested dicts.

    Raises:
      ConfigError: If the tracker is not installed or refuses the run.
    """
    return [Wandb(directory, config)] if self.tracker == "wandb" else []


class Profile:
  """Profiles some steps of a start, on every process.

  Attributes:
    folder: The folder that gets the profile.
  """

  def __init__(self, folder: pathlib.Path, begun: int, steps: int):
    """Prepares a profile.

    Args:
      folder: The folder for it.
      begun: The step from which this start goes on.
      steps: The number of steps to profile, from the fourth of this start on; 0 means none.
    """
    self.folder = folder
    self._first = begun + WARM + 1 if steps else None
    self._last = begun + WARM + steps
    self._on = False

  def before(self, step: int) -> None:
    """Begins the profile if `step`, which is about to start, is its first one."""
    if step == self._first:
      jax.profiler.start_trace(str(self.folder), create_perfetto_trace=True)
      self._on = True

  def after(self, step: int, result: Any) -> str:
    """Ends the profile after its last step.

    Args:
      step: The step that was dispatched.
      result: Its metrics, which are waited for, because steps run while the program goes on.

    Returns:
      A sentence that says where the profile is, or "" if none ended.
    """
    if not self._on or step < self._last:
      return ""
    jax.block_until_ready(result)
    self.close()
    assert self._first is not None
    return (
      f"profile of steps {self._first} to {step} in {self.folder}; open its file "
      "perfetto_trace.json.gz at ui.perfetto.dev"
    )

  def close(self) -> None:
    """Ends a profile that is still on."""
    if self._on:
      self._on = False
      jax.profiler.stop_trace()
