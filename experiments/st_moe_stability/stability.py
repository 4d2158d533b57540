"""Decides from a loss curve whether a run was unstable."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

SKIPPED = 40  # the first steps, in which a loss without warm-up may jump
WINDOW = 21  # steps of the running median
RISE = 0.5  # nats above the lowest median so far
PATIENCE = 40  # steps within which the median must be back below that
LEARNT = 1.0  # nats by which the loss must have fallen at the end


def is_unstable(
  loss: Sequence[float | None],
  skipped: int = SKIPPED,
  window: int = WINDOW,
  rise: float = RISE,
  patience: int = PATIENCE,
  learnt: float = LEARNT,
) -> bool:
  """Returns whether the loss is not finite, rises without coming back, or does not fall at all.

  The loss is smoothed by a running median over the last `window` steps. A blip of fewer than half
  as many steps cannot move it. At each step the median is compared with its minimum so far. The run
  is unstable if the median is more than `rise` above that minimum for `patience` steps in a row, or
  at the last step; the first `skipped` steps do not count. The run is also unstable if it ends less
  than `learnt` below the loss of the first step: a model that explodes and then dies gives every
  token the same probability, so that its loss returns to where it began.

  A loss that falls slowly, or that stops falling, is stable, because the definition is about
  failure and not about quality.

  Args:
    loss: The loss of each step from the first to the last, in nats. None stands for a loss that is
      not finite.
    skipped: A number of steps, >= 0.
    window: A number of steps, >= 1.
    rise: Nats, > 0.
    patience: A number of steps, >= 1.
    learnt: Nats, >= 0.
  """
  values = np.array([np.nan if value is None else value for value in loss], float)
  if not np.isfinite(values).all():
    return True
  if values[0] - running_median(values, window)[-1] < learnt:
    return True
  above = (height(values, window) > rise)[skipped:]
  return bool(len(above) and above[-1]) or _longest(above) >= patience


def height(values: Float[np.ndarray, "T"], window: int = WINDOW) -> Float[np.ndarray, "T"]:
  """Returns how far the running median of finite values lies above its minimum so far, >= 0."""
  smoothed = running_median(values, window)
  return smoothed - np.minimum.accumulate(smoothed)


def running_median(values: Float[np.ndarray, "T"], window: int) -> Float[np.ndarray, "T"]:
  """Returns at each step the median of the last `window` values, or of all if there are fewer."""
  return np.array([np.median(values[max(i + 1 - window, 0) : i + 1]) for i in range(len(values))])


def _longest(flags: np.ndarray) -> int:
  """Returns the length of the longest run of True."""
  longest = current = 0
  for flag in flags:
    current = current + 1 if flag else 0
    longest = max(longest, current)
  return longest
