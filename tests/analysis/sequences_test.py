import math

import numpy as np
import pytest

from moe_jax.analysis import sequences

pytestmark = pytest.mark.unit
NONE = 4  # stands for no expert of four


def test_uniform_repetition_is_that_of_mixtral():
  # Catches another formula: the paper has 12.5 % and about 46 % for 8 experts.
  first, either = sequences.uniform_repetition(8)
  assert first == 0.125 and either == pytest.approx(1 - 6 / 8 * 5 / 7)
  assert sequences.uniform_repetition(1) == (1.0, 1.0)


def test_repetition_of_a_periodic_text():
  # First choices 0 0 1 1 0 0 1 1: every other successor repeats. Catches pairs across documents, a
  # share of tokens in place of pairs, and shuffles that keep the order.
  first = np.array([0, 0, 1, 1] * 50)
  follows = np.arange(200) > 0
  none = np.full(200, NONE)
  found = sequences.repetition(first, none, follows, 4)
  assert found.first == pytest.approx(100 / 199) and found.pairs == 199
  assert found.first_shuffled == pytest.approx(0.5, abs=0.03)
  assert math.isnan(found.either) and math.isnan(found.either_shuffled)
  assert sequences.repetition(first, none, np.arange(200) % 2 == 1, 4).first == 1.0
  assert sequences.repetition(first, none, np.arange(200) % 4 == 2, 4).first == 0.0


def test_first_and_second_choices():
  # Catches second choices that are compared with themselves only, and two tokens without a second
  # choice that count as alike.
  follows = np.array([False, True])

  def either(first, second):
    return sequences.repetition(np.array(first), np.array(second), follows, 4).either

  assert either([0, 1], [2, 0]) == either([0, 1], [1, 2]) == either([0, 1], [2, 2]) == 1.0
  assert either([0, 1], [2, 3]) == either([0, 1], [NONE, 3]) == 0.0


def test_tokens_without_an_expert_repeat_nothing():
  # Catches two dropped tokens that count as a repetition.
  first = np.array([NONE, NONE, 1, 1])
  found = sequences.repetition(first, np.full(4, NONE), np.arange(4) > 0, 4)
  assert (found.first, found.pairs) == (1.0, 1)


def test_coactivation_of_a_map_and_of_independent_layers():
  # Catches rows and columns that are exchanged, and a level of chance that independence exceeds.
  here = np.array([0, 1, 2, 2] * 50)
  there = np.array([1, 0, 0, 0] * 50)
  found = sequences.coactivation(here, there, 3)
  assert found.counts.tolist() == [[0, 50, 0], [50, 0, 0], [100, 0, 0]]
  # The next expert follows from this one, and not the reverse.
  assert found.explained == pytest.approx(1.0) and found.chance < 0.05
  draw = np.random.default_rng(3)
  apart = sequences.coactivation(draw.integers(0, 3, 2000), draw.integers(0, 3, 2000), 3)
  assert apart.explained < 3 * apart.chance < 0.01


def test_churn():
  # Catches the share of tokens that stay, and a chance of 1 - 1/E with uneven loads.
  found = sequences.churn(np.array([0, 0, 1, NONE]), np.array([0, 1, 1, NONE]), 4)
  # By hand: 1 - (1/2 * 1/4 + 1/4 * 1/2 + 1/4 * 1/4).
  assert found == (0.25, pytest.approx(1 - 5 / 16))
