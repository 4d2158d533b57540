"""Decides which layers have experts, and finds the stretch of layers that repeats."""

from __future__ import annotations

import typing
from collections.abc import Sequence


def moe_layers(
  num_layers: int, first: int, every: int, dense: Sequence[int] = ()
) -> tuple[bool, ...]:
  """Returns for each layer i whether it has experts.

  It has some if i >= first and (i - first) % every == 0, and i is not in `dense`.
  """
  return tuple(
    i >= first and (i - first) % every == 0 and i not in dense for i in range(num_layers)
  )


class Pattern(typing.NamedTuple):
  """A sequence of layers, divided into single layers, a repeated stretch, and single layers.

  Attributes:
    prefix: Number of single layers before the repetition.
    period: Number of layers of the stretch that repeats.
    repeats: Number of repetitions. The layers after them are single again.
  """

  prefix: int
  period: int
  repeats: int

  @property
  def scanned(self) -> range:
    """The indices of the layers inside the repetition."""
    return range(self.prefix, self.prefix + self.period * self.repeats)


def find_pattern(kinds: Sequence[typing.Hashable]) -> Pattern:
  """Returns the pattern with the fewest layers to compile, which are prefix + period + remainder.

  There is no repetition if none saves a layer. Ties go to the shorter period, then to the shorter
  prefix.

  For example, with D for a dense layer and M for a layer with experts, D M D M D gives (0, 2, 2)
  with the remainder D, and D M M M M gives (1, 1, 4).

  Args:
    kinds: The kind of each layer. Layers of the same kind are alike and may be repeated.
  """
  n = len(kinds)
  best, fewest = Pattern(n, 0, 0), n
  for period in range(1, n // 2 + 1):
    # A longer prefix leaves no room for two repetitions, or saves no layer over the best pattern.
    for prefix in range(min(n - 2 * period + 1, fewest - period)):
      repeats = 1
      while list(kinds[prefix + repeats * period : prefix + (repeats + 1) * period]) == list(
        kinds[prefix : prefix + period]
      ):
        repeats += 1
      compiled = n - period * (repeats - 1)
      if repeats > 1 and compiled < fewest:
        best, fewest = Pattern(prefix, period, repeats), compiled
  return best
