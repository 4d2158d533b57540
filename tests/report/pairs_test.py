import re

import numpy as np
import pytest

from moe_jax.report.pairs import pairs_section
from moe_jax.report.tables import MOST_EXPERTS

pytestmark = pytest.mark.unit


def test_the_map_counts_a_pair_in_both_orders():
  # Tokens choose {0, 1}, {1, 0}, {0, 2} and {2, 3}; the last token has one choice. The second layer
  # has no second choices.
  # Catches a pair that counts in one order only, a token without a second choice, and a layer whose
  # map is empty.
  first = np.array([[0, 1, 0, 2, 3], [0, 1, 2, 3, 0]])
  second = np.array([[1, 0, 2, 3, 4], [4, 4, 4, 4, 4]])
  text = pairs_section(first, second, 4, ["layer <1>", "layer 3"])
  rows = dict(re.findall(r"<tr><td>(\d \(\d\))</td>(.*?)</tr>", text))
  cells = {name: re.findall(r">(\d+)</td>", row) for name, row in rows.items()}
  assert cells == {
    "0 (3)": ["0", "67", "33", "0"],
    "1 (2)": ["100", "0", "0", "0"],
    "2 (2)": ["50", "0", "0", "50"],
    "3 (1)": ["0", "0", "100", "0"],
  }
  assert "layer &lt;1&gt;" in text and "layer 3" not in text


def test_what_cannot_be_shown_is_left_out():
  # Catches an empty section of top-1 routing, a map of one pair, and one that nobody could read.
  first, none = np.array([[0, 1]]), np.array([[4, 4]])
  assert pairs_section(first, none, 4, ["1"]) == ""
  assert pairs_section(first, 1 - first, 2, ["1"]) == ""
  assert pairs_section(first, 1 - first, MOST_EXPERTS + 1, ["1"]) == ""
  assert pairs_section(first, 1 - first, 3, ["1"]) != ""
