"""What a run does about losses and gradients that are not finite, loss spikes, and experts that
nobody visits.

GLaM (arXiv 2112.06905, Sec. 5.1) names two tricks for training at scale: to skip the update of a
batch whose gradient has a NaN or an infinity, and to go on from an earlier healthy checkpoint after
a rare large fluctuation of the loss. PaLM (arXiv 2204.02311, Sec. 5.1) adds that the batches about
a spike are left out then. `Guard` decides; the skip itself is in `step.py` and the way back in
`loop.py`. All decisions depend on the losses of the run alone, and what they need is saved with
each checkpoint, so that a run that was killed decides as one that was not.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.errors import Diverged

FEWEST = 16  # good losses before a loss can be called a spike
MAD_TO_SIGMA = (
  1.4826  # the standard deviation of a normal distribution over its median absolute deviation
)
LEAST_SIGMA = 0.01  # of the median: a smooth stretch of the curve must not turn ripples into spikes
STARVED_LINES = 3  # log lines in a row after which an expert counts as starved


@dataclasses.dataclass
class Guard:
  """Judges every step of a run.

  A step is bad if its loss or gradient is not finite, or if its loss is a spike: more than
  `spike_sigmas` above the median of the last `spike_window` good losses, in units of 1.4826 times
  their median absolute deviation, or of 1% of the median where that is more.

  Attributes:
    skip_nonfinite: updates whose gradient is not finite are skipped by the step.
    spike_sigmas: 0: no loss is a spike.
    spike_window: good losses that a loss is compared with.
    patience: bad steps in a row after which the run goes back.
    max_rollbacks: how often it goes back; then it stops as diverged.
    rollback_margin: steps; it goes back to a checkpoint from at least that long before the first
      bad step.
    starved_share: an expert is starved whose share of the assignments is below this part of an even
      share; 0: none is.
    losses: the last good losses.
    streak: bad steps in a row until now.
    skipped_updates: in all.
    rollbacks: until now.
    skipped_batches: that no update of this run's weights has seen, because the run went back.
    starved: for each layer and expert, log lines in a row at which it was starved.
  """

  skip_nonfinite: bool = False
  spike_sigmas: float = 0.0
  spike_window: int = 64
  patience: int = 8
  max_rollbacks: int = 0
  rollback_margin: int = 0
  starved_share: float = 0.0
  losses: list[float] = dataclasses.field(default_factory=list)
  streak: int = 0
  skipped_updates: int = 0
  rollbacks: int = 0
  skipped_batches: int = 0
  starved: list[list[int]] = dataclasses.field(default_factory=list)

  @property
  def watches(self) -> bool:
    """Whether each loss must be known before the next step is decided on."""
    return bool(self.skip_nonfinite or self.spike_sigmas or self.max_rollbacks)

  def judge(
    self, step: int, loss: float, norm: float, tensor: str, kept: str
  ) -> list[dict[str, Any]]:
    """The events of a step; the last one is of kind "rollback" if the run must go back.

    Args:
      step: that was done.
      loss: of the step.
      norm: of its gradient, before clipping.
      tensor: the first parameter whose gradient is not finite; "" where all are.
      kept: what there is to go on from, for the message.

    Raises:
      Diverged: the step's numbers are not finite, and nothing is left that could be done about it.
    """
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite and not self._is_spike(loss):
      self.streak = 0
      if self.spike_sigmas:
        self.losses = [*self.losses, loss][-self.spike_window :]
      return []
    self.streak += 1
    events = [self._spike(step, loss) if finite else self._nonfinite(step, loss, norm, tensor)]
    ruined = not finite and not self.skip_nonfinite
    if not ruined and self.streak < self.patience:
      return events
    if self.rollbacks < self.max_rollbacks:
      return [
        *events,
        {
          "event": "rollback",
          "message": f"going back after {self.streak} bad "
          f"{'step' if self.streak == 1 else 'steps'} in a row",
        },
      ]
    if not finite:
      raise Diverged(self._last_words(step, loss, norm, tensor, kept))
    # Nobody goes back, so that the new level of the loss has to be taken as the usual one.
    self.streak, self.losses = 0, []
    return events

  def healthy_before(self, step: int) -> int:
    """Below which step a checkpoint counts as healthy, where `step` is the last of a row of bad
    ones."""
    return step - self.streak + 1 - self.rollback_margin

  def went_back(self, step: int, to: int) -> None:
    """Notes that the run has gone back from `step` to the checkpoint of step `to` and goes on with
    new batches."""
    self.rollbacks += 1
    self.skipped_batches += step - to
    self.streak = 0

  def watch_load(self, load: np.ndarray | None, layers: Sequence[str]) -> list[dict[str, Any]]:
    """An event for each layer in which experts have just become starved.

    Args:
      load: [Lm, E], each expert's share of the assignments, at a log line; None: there are no
        experts.
      layers: the names of the Lm layers.
    """
    if load is None or not self.starved_share:
      return []
    before = (
      np.array(self.starved, int)
      if np.shape(self.starved) == load.shape
      else np.zeros(load.shape, int)
    )
    now = np.where(load * load.shape[-1] < self.starved_share, before + 1, 0)
    self.starved = now.tolist()
    return [
      self._starved(layers[i], np.flatnonzero(now[i] >= STARVED_LINES), load[i])
      for i in range(len(load))
      if (now[i] == STARVED_LINES).any()
    ]

  def state(self) -> dict[str, Any]:
    """What a checkpoint must hold for `restore`; JSON."""
    return {name: getattr(self, name) for name in _STATE}

  def restore(self, state: Mapping[str, Any], keep_counts: bool = False) -> None:
    """Takes back what `state` returned.

    Args:
      state: of a checkpoint.
      keep_counts: the run goes back by itself, and what it has counted stays counted.
    """
    for name in _STATE:
      if name in state and not (keep_counts and name in _COUNTS):
        setattr(self, name, state[name])

  def summary(self) -> str:
    """What has happened until now, for the progress line; "" if nothing has."""
    counts = ((self.skipped_updates, "skipped update"), (self.rollbacks, "rollback"))
    return ", ".join(f"{count} {what}{'s' if count > 1 else ''}" for count, what in counts if count)

  def _is_spike(self, loss: float) -> bool:
    if not self.spike_sigmas or len(self.losses) < min(FEWEST, self.spike_window):
      return False
    median, sigma = self._usual()
    return loss > median + self.spike_sigmas * sigma

  def _usual(self) -> tuple[float, float]:
    """The median of the last good losses, and their spread in units of a standard deviation."""
    median = statistics.median(self.losses)
    spread = statistics.median(abs(loss - median) for loss in self.losses)
    return median, max(MAD_TO_SIGMA * spread, LEAST_SIGMA * abs(median))

  def _spike(self, step: int, loss: float) -> dict[str, Any]:
    median, sigma = self._usual()
    return {
      "event": "spike",
      "loss": loss,
      "message": f"the loss of step {step} is a spike: {loss:.4f}, which is "
      f"{(loss - median) / sigma:.1f} sigmas above the median {median:.4f} of the last "
      f"{len(self.losses)}",
    }

  def _nonfinite(self, step: int, loss: float, norm: float, tensor: str) -> dict[str, Any]:
    self.skipped_updates += self.skip_nonfinite
    then = "its update was skipped" if self.skip_nonfinite else "its update has ruined the weights"
    return {
      "event": "nonfinite",
      "tensor": tensor,
      "message": f"the gradient of step {step} is not finite "
      f"(loss {loss:.4g}, norm {norm:.4g}, first in {tensor or 'the loss'}); {then}",
    }

  def _starved(self, layer: str, experts: np.ndarray, load: np.ndarray) -> dict[str, Any]:
    fullest = int(load.argmax())
    return {
      "event": "starved",
      "layer": layer,
      "experts": experts.tolist(),
      "message": f"the router of {layer} is collapsing: {_plural(len(experts), 'expert')} of "
      f"{len(load)} ({_shortened(experts.tolist())}) got less than {self.starved_share:g} of an "
      f"even share at {STARVED_LINES} log lines in a row, while expert {fullest} gets "
      f"{load[fullest]:.0%} of the assignments",
    }

  def _last_words(self, step: int, loss: float, norm: float, tensor: str, kept: str) -> str:
    where = f", and the first tensor whose gradient is not finite is {tensor}" if tensor else ""
    tried = f" after {self.summary()}" if self.summary() else ""
    offer = (
      ""
      if self.max_rollbacks
      else " go on from there with --config.train.guard.skip_nonfinite=True, or with "
      "--config.train.guard.max_rollbacks=3; or"
    )
    return (
      f"training has diverged{tried}: at step {step} the loss is {loss} and the gradient's norm "
      f"{norm}{where}; {kept};{offer} start again in another --workdir with a lower "
      "optimizer.learning_rate, a longer optimizer.warmup_steps or a smaller optimizer.clip_norm"
    )


_COUNTS = ("skipped_updates", "rollbacks", "skipped_batches")
_STATE = ("losses", "streak", "starved", *_COUNTS)


def _plural(count: int, noun: str) -> str:
  return f"{count} {noun}{'' if count == 1 else 's'}"


def _shortened(numbers: Sequence[int], most: int = 8) -> str:
  """The first numbers of a list, in words."""
  rest = f" and {len(numbers) - most} more" if len(numbers) > most else ""
  return ", ".join(map(str, numbers[:most])) + rest
