"""The guard of a run, which reacts to non-finite numbers, loss spikes and experts without tokens.

GLaM (arXiv 2112.06905, Sec. 5.1) names two tricks for training at scale. One is to skip the update
of a batch whose gradient has a NaN or an infinity. The other is to restart from an earlier healthy
checkpoint after a rare large fluctuation of the loss. PaLM (arXiv 2204.02311, Sec. 5.1) adds that
the batches around a spike are then skipped. `Guard` decides; the update is skipped in `step.py`,
and the run is taken back in `loop.py`. All decisions depend on the run's metrics alone, and what
they need is saved with each checkpoint. A run that was killed and resumed therefore decides as one
that was not.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from moe_jax.errors import Diverged
from moe_jax.options import NOT_NEGATIVE, OPTIONAL_STEPS, STEPS, Bounds, Options, option

# The number of good losses that are needed before a loss can be called a spike.
FEWEST = 16
# The standard deviation of a normal distribution over its median absolute deviation.
MAD_TO_SIGMA = 1.4826
# The least sigma as a fraction of the median. Without it, the ripples of a smooth curve would count
# as spikes.
LEAST_SIGMA = 0.01
# The number of log lines in a row after which an expert counts as starved.
STARVED_LINES = 3


@dataclasses.dataclass(frozen=True)
class GuardOptions(Options):
  """The section `train.guard`: what is done about steps that go wrong."""

  skip_nonfinite: bool = option(
    False, "Whether an update whose gradient is not finite is skipped (GLaM)."
  )
  spike_sigmas: Annotated[float, NOT_NEGATIVE] = option(
    0.0,
    "A loss that far above the median of the last good ones is a spike, in units of 1.4826 times "
    "their median absolute deviation, or of 1% of the median where that is more; 0 = no loss is "
    "one.",
  )
  spike_window: Annotated[
    int, Bounds(16, 100_000, "they are sorted in each step; fewer do not tell what is usual")
  ] = option(64, "Good losses that a loss is compared with.")
  patience: Annotated[int, STEPS] = option(
    8, "Bad steps in a row (not finite, or a spike) after which the run goes back to a checkpoint."
  )
  max_rollbacks: Annotated[int, OPTIONAL_STEPS] = option(
    0,
    "How often the run goes back and skips the batches since (GLaM); after that it stops as "
    "diverged.",
  )
  rollback_margin: Annotated[int, OPTIONAL_STEPS] = option(
    0, "The run goes back to a checkpoint from at least so many steps before the first bad step."
  )
  starved_share: Annotated[float, Bounds(0, 1, "a share of an even load")] = option(
    0.0, "Warns of experts that get less than this part of an even share; 0 = never."
  )


@dataclasses.dataclass
class Guard:
  """Judges every step of a run.

  A step is bad if its loss or gradient is not finite, or if its loss is a spike.

  Attributes:
    options: The section `train.guard`.
    losses: The last good losses.
    streak: How many bad steps in a row there have been until now.
    skipped_updates: How many updates were skipped in all.
    rollbacks: How often the run has gone back.
    skipped_batches: Batches that no update of this run's weights has seen, because it went back.
    starved: For each layer and expert, log lines in a row at which it was starved.
  """

  options: GuardOptions = GuardOptions()
  losses: list[float] = dataclasses.field(default_factory=list)
  streak: int = 0
  skipped_updates: int = 0
  rollbacks: int = 0
  skipped_batches: int = 0
  starved: list[list[int]] = dataclasses.field(default_factory=list)

  @property
  def watches(self) -> bool:
    """Whether the loss of each step must be known before the next step begins."""
    return bool(
      self.options.skip_nonfinite or self.options.spike_sigmas or self.options.max_rollbacks
    )

  def judge(
    self, step: int, loss: float, norm: float, tensor: str, kept: str
  ) -> list[dict[str, Any]]:
    """Returns the events of a step; the last one is a "rollback" if the run must go back.

    Args:
      step: The step that has just been done.
      loss: The loss of the step.
      norm: The norm of its gradient before clipping.
      tensor: The first parameter whose gradient is not finite, or "" if all are finite.
      kept: A clause that says which checkpoint the run could continue from; for the message.

    Raises:
      Diverged: If the loss or the gradient is not finite, and neither skipping the update nor going
        back to a checkpoint is left as a remedy.
    """
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite and not self._is_spike(loss):
      self.streak = 0
      if self.options.spike_sigmas:
        self.losses = [*self.losses, loss][-self.options.spike_window :]
      return []
    self.streak += 1
    events = [self._spike(step, loss) if finite else self._nonfinite(step, loss, norm, tensor)]
    ruined = not finite and not self.options.skip_nonfinite
    if not ruined and self.streak < self.options.patience:
      return events
    if self.rollbacks < self.options.max_rollbacks:
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
    # The run does not go back, so the new level of the loss has to be accepted as the usual one.
    self.streak, self.losses = 0, []
    return events

  def healthy_before(self, step: int) -> int:
    """Returns the step below which checkpoints count as healthy.

    Args:
      step: The last step of the current row of bad steps.
    """
    return step - self.streak + 1 - self.options.rollback_margin

  def went_back(self, step: int, to: int) -> None:
    """Records that the run has gone back from `step` to the checkpoint of step `to`.

    The batches of the steps in between are not read again.
    """
    self.rollbacks += 1
    self.skipped_batches += step - to
    self.streak = 0

  def watch_load(self, load: np.ndarray | None, layers: Sequence[str]) -> list[dict[str, Any]]:
    """Returns an event for each layer in which experts have just become starved.

    Args:
      load: Each expert's share of the assignments at a log line, [Lm, E]. None means that there are
        no experts.
      layers: The names of the Lm layers.
    """
    if load is None or not self.options.starved_share:
      return []
    before = (
      np.array(self.starved, int)
      if np.shape(self.starved) == load.shape
      else np.zeros(load.shape, int)
    )
    now = np.where(load * load.shape[-1] < self.options.starved_share, before + 1, 0)
    self.starved = now.tolist()
    return [
      self._starved(layers[i], np.flatnonzero(now[i] >= STARVED_LINES), load[i])
      for i in range(len(load))
      if (now[i] == STARVED_LINES).any()
    ]

  def state(self) -> dict[str, Any]:
    """Returns what a checkpoint must hold for `restore`, as JSON."""
    return {name: getattr(self, name) for name in _STATE}

  def restore(self, state: Mapping[str, Any], keep_counts: bool = False) -> None:
    """Restores what `state` returned.

    Args:
      state: The value in a checkpoint.
      keep_counts: Whether the counts stay as they are. This is so when a running run goes back.
    """
    for name in _STATE:
      if name in state and not (keep_counts and name in _COUNTS):
        setattr(self, name, state[name])

  def summary(self) -> str:
    """Returns the counts so far in words for the progress line, or "" if all are 0."""
    counts = ((self.skipped_updates, "skipped update"), (self.rollbacks, "rollback"))
    return ", ".join(f"{count} {what}{'s' if count > 1 else ''}" for count, what in counts if count)

  def _is_spike(self, loss: float) -> bool:
    """Returns whether this loss is far above the last good ones."""
    if not self.options.spike_sigmas or len(self.losses) < min(FEWEST, self.options.spike_window):
      return False
    median, sigma = self._usual()
    return loss > median + self.options.spike_sigmas * sigma

  def _usual(self) -> tuple[float, float]:
    """Returns the median of the last good losses, and their spread as a standard deviation."""
    median = statistics.median(self.losses)
    spread = statistics.median(abs(loss - median) for loss in self.losses)
    return median, max(MAD_TO_SIGMA * spread, LEAST_SIGMA * abs(median))

  def _spike(self, step: int, loss: float) -> dict[str, Any]:
    """Returns the event of a spike."""
    median, sigma = self._usual()
    return {
      "event": "spike",
      "loss": loss,
      "message": f"the loss of step {step} is a spike: {loss:.4f}, which is "
      f"{(loss - median) / sigma:.1f} sigmas above the median {median:.4f} of the last "
      f"{len(self.losses)}",
    }

  def _nonfinite(self, step: int, loss: float, norm: float, tensor: str) -> dict[str, Any]:
    """Returns the event of a step that is not finite, and counts its update if it was skipped."""
    self.skipped_updates += self.options.skip_nonfinite
    then = (
      "its update was skipped"
      if self.options.skip_nonfinite
      else "its update has ruined the weights"
    )
    return {
      "event": "nonfinite",
      "tensor": tensor,
      "message": f"the gradient of step {step} is not finite "
      f"(loss {loss:.4g}, norm {norm:.4g}, first in {tensor or 'the loss'}); {then}",
    }

  def _starved(self, layer: str, experts: np.ndarray, load: np.ndarray) -> dict[str, Any]:
    """Returns the event of a layer whose `experts` are starved; `load` is that of all experts."""
    fullest = int(load.argmax())
    return {
      "event": "starved",
      "layer": layer,
      "experts": experts.tolist(),
      "message": f"the router of {layer} is collapsing: {_plural(len(experts), 'expert')} of "
      f"{len(load)} ({_shortened(experts.tolist())}) got less than {self.options.starved_share:g} "
      f"of an even share at {STARVED_LINES} log lines in a row, while expert {fullest} gets "
      f"{load[fullest]:.0%} of the assignments",
    }

  def _last_words(self, step: int, loss: float, norm: float, tensor: str, kept: str) -> str:
    """Returns the message of a run that has diverged, with remedies."""
    where = f", and the first tensor whose gradient is not finite is {tensor}" if tensor else ""
    tried = f" after {self.summary()}" if self.summary() else ""
    offer = (
      ""
      if self.options.max_rollbacks
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
  """Returns the count with the noun in singular or plural, as in "3 experts"."""
  return f"{count} {noun}{'' if count == 1 else 's'}"


def _shortened(numbers: Sequence[int], most: int = 8) -> str:
  """Returns the first numbers of a list, and how many more there are."""
  rest = f" and {len(numbers) - most} more" if len(numbers) > most else ""
  return ", ".join(map(str, numbers[:most])) + rest
