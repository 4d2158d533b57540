import math

import numpy as np
import pytest

from moe_jax.analysis.sharpness import chance_of_rise, spearman

pytestmark = pytest.mark.unit


def rho(x, y):
  return spearman(np.array(x), np.array(y))


def test_rank_correlation():
  # By hand: ranks 1 2 3 4 and 2 1 4 3 differ by 1 each, so that rho = 1 - 6 * 4 / (4 * 15).
  # Catches Pearson's correlation, and ranks of equal values that depend on their order.
  assert rho([0, 1, 2, 3], [5, 1, 100, 7]) == pytest.approx(0.6)
  assert rho([0, 1, 2], [3, 2, 1]) == pytest.approx(-1)
  assert rho([0, 1, 2], [1, 1, 2]) == pytest.approx(math.sqrt(3) / 2)
  assert rho([0, 1, 2], [1, 1, 1]) == 0.0


def test_chance_of_a_rise():
  # Catches a two-sided test, an order that is left out, and a claim of three layers at 5 %.
  assert chance_of_rise(np.array([1, 2, 3])) == pytest.approx(1 / 6)
  assert chance_of_rise(np.array([1, 2, 3, 4])) == pytest.approx(1 / 24)
  assert chance_of_rise(np.array([3, 2, 1])) == 1.0
  assert chance_of_rise(np.array([1, 1])) == 1.0 and chance_of_rise(np.array([1])) == 1.0


def test_chance_of_many_layers_is_sampled():
  # Catches ten million orders, a chance of 0, and a chance of the other tail. The chances of a list
  # and of its negative add up to 1, but for orders that have the same correlation.
  values = np.random.default_rng(0).normal(size=9)
  chances = chance_of_rise(values), chance_of_rise(-values)
  assert sum(chances) == pytest.approx(1, abs=0.03) and min(chances) > 0.02
  assert (chances[0] < chances[1]) == (spearman(np.arange(9), values) > 0)
  assert chance_of_rise(np.arange(32)) == pytest.approx(1 / 10_001)
