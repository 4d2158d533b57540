"""Tests the limits on groups of experts by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import ConfigError
from moe_jax.routing.groups import check_groups, limit_to_groups

pytestmark = pytest.mark.unit

# The groups of token 0 are (9, 0), (6, 5) and (7, 1), with best scores of 9, 6 and 7, and sums of
# 9, 11 and 8. The groups of token 1 are (1, 2), (2, 0) and (0, 0), with best scores of 2, 2 and 0,
# and sums of 3, 2 and 0.
SCORES = jnp.array([[9.0, 0.0, 6.0, 5.0, 7.0, 1.0], [1.0, 2.0, 2.0, 0.0, 0.0, 0.0]])


@pytest.mark.parametrize(
  ("kept", "best", "expected"),
  [
    (1, 1, [{0, 1}, {0, 1}]),
    (2, 1, [{0, 1, 4, 5}, {0, 1, 2, 3}]),
    (3, 1, [set(range(6)), set(range(6))]),
    (1, 2, [{2, 3}, {0, 1}]),
    (2, 2, [{0, 1, 2, 3}, {0, 1, 2, 3}]),
    (1, 5, [{2, 3}, {0, 1}]),
  ],
)
def test_by_hand(kept, best, expected):
  # Catches interleaved instead of consecutive groups, a sum over the whole group for best=1, a tie
  # (of token 1 for best=1) that the higher group wins, and errors if `best` exceeds a group's size.
  limited = np.asarray(limit_to_groups(SCORES, 3, kept, best))
  assert [set(np.flatnonzero(np.isfinite(row))) for row in limited] == expected
  np.testing.assert_array_equal(
    limited[np.isfinite(limited)], np.asarray(SCORES)[np.isfinite(limited)]
  )


def test_one_group_is_no_limit():
  # Catches a mask that removes experts although there is only one group.
  np.testing.assert_array_equal(limit_to_groups(SCORES, 1, 1, 2), SCORES)


def test_groups_of_one_expert():
  # Catches a top-2 of one expert.
  limited = np.asarray(limit_to_groups(SCORES, 6, 2, 2))
  assert [np.flatnonzero(np.isfinite(row)).tolist() for row in limited] == [[0, 4], [1, 2]]


@pytest.mark.parametrize(
  ("k", "groups", "kept_groups", "field"),
  [
    (1, 4, 1, "groups"),
    (1, 0, 1, "groups"),
    (1, 3, 0, "kept_groups"),
    (1, 3, 4, "kept_groups"),
    (5, 3, 2, "x.k"),
    (0, 3, 2, "x.k"),
  ],
)
def test_bad_options_are_named(k, groups, kept_groups, field):
  # Catches a reshape error, and K experts if fewer are within the limit (the others would have the
  # score -inf).
  with pytest.raises(ConfigError, match=field):
    check_groups("x", k, groups, kept_groups, num_experts=6)


def test_the_limit_itself_is_allowed():
  # Catches k < limit instead of k <= limit.
  check_groups("x", k=4, groups=3, kept_groups=2, num_experts=6)
