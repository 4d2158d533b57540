"""Tests which layers have experts, and which stretch of layers repeats."""

import pytest

from moe_jax.models.pattern import Pattern, find_pattern, moe_layers

pytestmark = pytest.mark.unit


def test_moe_layers():
  # Catches counting `every` from layer 0 instead of from `first`.
  assert moe_layers(6, 1, 2) == (False, True, False, True, False, True)
  assert moe_layers(5, 2, 2) == (False, False, True, False, True)
  assert moe_layers(3, 0, 1) == (True,) * 3
  assert moe_layers(4, 0, 1, [2]) == (True, True, False, True)


@pytest.mark.parametrize(
  "kinds, expected",
  [
    ("DMDM", Pattern(0, 2, 2)),
    # One layer remains after the repetition.
    ("DMDMD", Pattern(0, 2, 2)),
    # In DeepSeekMoE, the first layer is dense.
    ("DMMMM", Pattern(1, 1, 4)),
    ("DDDD", Pattern(0, 1, 4)),
    # This is ST-MoE's pattern. It compiles 4 layers, where a scan of three D would compile 6.
    ("DDDMDDDM", Pattern(0, 4, 2)),
    ("D", Pattern(1, 0, 0)),
    ("DM", Pattern(2, 0, 0)),
  ],
)
def test_find_pattern(kinds, expected):
  # Catches a remainder that is lost, a prefix that is scanned, and a period that is not the
  # cheapest.
  assert find_pattern(kinds) == expected


def test_layers_are_covered_once():
  # Catches off-by-one errors at either end of the repetition, for every placement of experts in up
  # to 9 layers.
  for n in range(1, 10):
    for bits in range(2**n):
      kinds = [bool(bits >> i & 1) for i in range(n)]
      prefix, period, repeats = pattern = find_pattern(kinds)
      scanned = pattern.scanned
      assert prefix == scanned.start and scanned.stop <= n
      assert all(kinds[i] == kinds[prefix + (i - prefix) % period] for i in scanned)
