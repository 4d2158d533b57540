"""Which layers have experts, and which stretch of layers repeats."""

from __future__ import annotations

import typing
from collections.abc import Sequence


def moe_layers(num_layers: int, first: int, every: int) -> tuple[bool, ...]:
  """Whether layer i has experts: i >= first and (i - first) % every == 0."""
  return tuple(i >= first and (i - first) % every == 0 for i in range(num_layers))


class Pattern(typing.NamedTuple):
  """A sequence of layers as `prefix` single ones, `repeats` times `period` of them, and a remainder
  of single ones."""

  prefix: int
  period: int
  repeats: int

  @property
  def scanned(self) -> range:
    """The layers inside the repetition."""
    return range(self.prefix, self.prefix + self.period * self.repeats)


def find_pattern(kinds: Sequence[typing.Hashable]) -> Pattern:
  """The pattern with the fewest layers to compile: prefix + period + remainder; no repetition if
  none saves a layer.

  Ties go to the shorter period, then to the shorter prefix. Example: D M D M D -> (0, 2, 2),
  remainder D; D M M M M -> (1, 1, 4).
  """
  n = len(kinds)
  best, fewest = Pattern(n, 0, 0), n
  for period in range(1, n // 2 + 1):
    for prefix in range(
      min(n - 2 * period + 1, fewest - period)
    ):  # others would have no fewer layers
      repeats = 1
      while list(kinds[prefix + repeats * period : prefix + (repeats + 1) * period]) == list(
        kinds[prefix : prefix + period]
      ):
        repeats += 1
      compiled = n - period * (repeats - 1)
      if repeats > 1 and compiled < fewest:
        best, fewest = Pattern(prefix, period, repeats), compiled
  return best
