"""When a run counts as unstable: one function of its loss curve."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

SKIPPED = 40  # first steps, in which a loss without warm-up may jump
WINDOW = 21  # steps of the running median
RISE = 0.5  # nats above the least that the median has been
PATIENCE = 40  # steps within which it must be back
LEARNT = 1.0  # nats that the loss must have fallen in all


def is_unstable(
  loss: Sequence[float | None],
  skipped: int = SKIPPED,
  window: int = WINDOW,
  rise: float = RISE,
  patience: int = PATIENCE,
  learnt: float = LEARNT,
) -> bool:
  """Whether training failed: a loss that is no number, that rises and does not come back, or that
  never falls.

  The loss is smoothed by a running median over the last `window` steps, which a blip of fewer than
  half as many steps cannot move. At each step it is compared with the least that it has been so
  far. The run is unstable if it is more than `rise` above for `patience` steps in a row, or at the
  last step; the first `skipped` steps do not count. It is also unstable if it ends less than
  `learnt` below the first step's loss: a model that explodes and soon dies, and gives every token
  the same probability from there on, comes back to where it began.

  A loss that falls slowly, or that stops falling, is stable: the definition is of failure, not of
  quality.

  Args:
    loss: of each step from the first to the last, in nats; None stands for what is not finite.
    skipped: >= 0, steps.
    window: >= 1, steps.
    rise: > 0, nats.
    patience: >= 1, steps.
    learnt: >= 0, nats.
  """
  values = np.array([np.nan if value is None else value for value in loss], float)
  if not np.isfinite(values).all():
    return True
  if values[0] - running_median(values, window)[-1] < learnt:
    return True
  above = (height(values, window) > rise)[skipped:]
  return bool(len(above) and above[-1]) or _longest(above) >= patience


def height(values: Float[np.ndarray, "T"], window: int = WINDOW) -> Float[np.ndarray, "T"]:
  """How far the running median of finite values lies above the least that it has been so far, >=
  0."""
  smoothed = running_median(values, window)
  return smoothed - np.minimum.accumulate(smoothed)


def running_median(values: Float[np.ndarray, "T"], window: int) -> Float[np.ndarray, "T"]:
  """At each step the median of the last `window` values, or of all so far where there are fewer."""
  return np.array([np.median(values[max(i + 1 - window, 0) : i + 1]) for i in range(len(values))])


def _longest(flags: np.ndarray) -> int:
  """The length of the longest stretch of True."""
  longest = current = 0
  for flag in flags:
    current = current + 1 if flag else 0
    longest = max(longest, current)
  return longest
