import math

import numpy as np
import pytest

from moe_jax.analysis import information as info

pytestmark = pytest.mark.unit


def test_tables_and_what_they_explain():
  # Catches tokens without an expert that are counted, axes that are exchanged, and an entropy that
  # is divided by that of the columns.
  counts = info.table(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 3]), (2, 3))
  assert counts.tolist() == [[2, 0, 0], [0, 1, 0]]
  # The columns determine the rows.
  assert info.explained(counts) == pytest.approx(1.0)
  # Rows and columns are independent.
  assert info.explained(np.array([[2, 4], [1, 2]])) == pytest.approx(0.0, abs=1e-12)
  # By hand: p = [[1/2, 0], [1/4, 1/4]]; H(row) = ln 2, H(column) = H(3/4), H(joint) = 1.5 ln 2.
  of_column = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
  expected = (math.log(2) + of_column - 1.5 * math.log(2)) / math.log(2)
  assert info.explained(np.array([[2, 0], [1, 1]])) == pytest.approx(expected)
  assert info.explained(np.zeros((2, 2), int)) == 0.0


def test_relative_counts():
  # Catches a ratio to the uniform distribution, and a division by 0.
  counts = np.array([[3, 1, 0], [1, 3, 0]])
  expected = [[1.5, 0.5, np.nan], [0.5, 1.5, np.nan]]
  np.testing.assert_allclose(info.relative(counts), expected)


def test_chance_is_what_a_small_sample_shows_by_itself():
  # Catches a level of chance of 0, by which every random router would look specialised, and one
  # that depends on the run.
  rows = np.arange(60) % 3
  assert info.explained(info.table(rows, rows, (3, 3))) == pytest.approx(1.0)
  level = info.explained_by_chance(rows, rows, (3, 3))
  assert 0 < level < 0.15 and level == info.explained_by_chance(rows, rows, (3, 3))


def test_information_of_labels():
  # x = y xor z, with uniform y and z. Each alone tells nothing about x, and both tell all.
  # Catches a condition that is left out, and joint labels that collide.
  y, z = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
  entropies = info.Entropies({"x": y ^ z, "y": y, "z": z})
  assert entropies.joint() == 0 and entropies.joint("x", "x") == pytest.approx(math.log(2))
  assert entropies.information("x", "y") == pytest.approx(0, abs=1e-12)
  assert entropies.information("x", "y", "z") == pytest.approx(math.log(2))
  # A label with one bit cannot tell more than that about one with two.
  entropies = info.Entropies({"x": 2 * y + z, "y": y, "z": z})
  assert entropies.joint("x") == pytest.approx(2 * math.log(2))
  assert entropies.most("x", "y") == entropies.most("x", "y", "z") == pytest.approx(math.log(2))


def test_many_labels_are_counted_by_sorting():
  # Catches an array with an entry for each of 10^12 pairs.
  big = np.array([0, 10**6, 10**6])
  entropies = info.Entropies({"x": big, "y": big[::-1].copy()})
  assert entropies.joint("x", "y") == pytest.approx(math.log(3))


def test_shuffles_stay_within_strata():
  # Catches a shuffle that moves tokens to another stratum, or that moves nothing.
  strata = np.array([0, 1] * 50)
  order = info.shuffled_within(strata, np.random.default_rng(0))
  assert sorted(order) == list(range(100)) and (strata[order] == strata).all()
  assert (order != np.arange(100)).sum() > 80


def test_pairs_beside_chance():
  # Worked by hand. All three pairs of three labels equally often are chance, and so is any table of
  # three labels, because its sums of rows fix all pairs. Of four labels in two pairs that never
  # mix, each label would meet each of the other three equally often: 10 / (10 / 3) = 3.
  # Catches a chance that pairs a label with itself, by which the first table would be 1.5.
  def relative(rows):
    return info.relative_pairs(np.array(rows))

  off = ~np.eye(3, dtype=bool)
  for rows in ([[0, 5, 5], [5, 0, 5], [5, 5, 0]], [[0, 8, 2], [8, 0, 3], [2, 3, 0]]):
    np.testing.assert_allclose(relative(rows)[off], 1.0, rtol=1e-6)
  apart = relative([[0, 10, 0, 0], [10, 0, 0, 0], [0, 0, 0, 10], [0, 0, 10, 0]])
  assert apart[0, 1] == pytest.approx(3) and apart[0, 2] == 0 and np.isnan(apart[1, 1])
  empty = relative([[0, 4, 0], [4, 0, 0], [0, 0, 0]])
  assert empty[0, 1] == pytest.approx(1) and np.isnan(empty[2]).all()
