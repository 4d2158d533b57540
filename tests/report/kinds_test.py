import math
import re

import numpy as np
import pytest

from moe_jax.report import kinds

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
  "piece, expected",
  [
    (None, "special"),
    (" \n", "white space"),
    ("", "other"),  # a part of a character
    ("the", "lower-case"),
    (" The", "capitalised"),
    ("é", "lower-case"),
    ("NASA", "capitalised"),
    ("42", "number"),
    (",", "punctuation"),
    (" ==", "punctuation"),
    ("x1", "other"),
    ("→", "other"),
  ],
)
def test_kinds_of_tokens(piece, expected):
  # Catches a subword whose leading space makes it another kind, and accented letters that count as
  # symbols.
  assert kinds.kind(piece) == expected and expected in kinds.KINDS


def test_counts_and_what_they_explain():
  # Catches tokens without an expert that are counted, axes that are exchanged, and an entropy that
  # is divided by that of the expert.
  names = ["number"] * 2 + ["special"] * 2
  table = kinds.counts(names, np.array([0, 0, 1, 3]), 3)
  assert table[kinds.KINDS.index("number")].tolist() == [2, 0, 0]
  assert table[kinds.KINDS.index("special")].tolist() == [0, 1, 0]
  # The expert determines the kind.
  assert kinds.explained(table) == pytest.approx(1.0)
  # Kind and expert are independent.
  assert kinds.explained(np.array([[2, 4], [1, 2]])) == pytest.approx(0.0, abs=1e-12)
  # By hand: p = [[1/2, 0], [1/4, 1/4]]; H(kind) = ln 2, H(expert) = H(3/4), H(joint) = 1.5 ln 2.
  of_expert = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
  expected = (math.log(2) + of_expert - 1.5 * math.log(2)) / math.log(2)
  assert kinds.explained(np.array([[2, 0], [1, 1]])) == pytest.approx(expected)
  assert kinds.explained(np.zeros((2, 2), int)) == 0.0


def test_chance_is_what_a_small_sample_shows_by_itself():
  # Catches a level of chance of 0, by which every random router would look specialised, and one
  # that depends on the run.
  names = ["number", "special", "punctuation"] * 20
  chosen = np.arange(60) % 3
  assert kinds.explained(kinds.counts(names, chosen, 3)) == pytest.approx(1.0)
  level = kinds.chance(names, chosen, 3)
  assert 0 < level < 0.15 and level == kinds.chance(names, chosen, 3)


def test_the_section_has_a_table_a_layer():
  # Catches layers that show the experts of another one, and shares over experts instead of kinds.
  pieces, chosen = ["a", "b", "1", None], np.array([[0, 1, 1, 2], [1, 1, 0, 0]])
  text = kinds.kinds_section(pieces, chosen, 2, ["layer <1>", "layer 3"])
  tables = re.findall(r"<table.*?</table>", text)
  assert len(tables) == 2 and "layer &lt;1&gt;" in text
  rows = [dict(re.findall(r"<tr><td>([\w-]+) \(\d+\)</td>(.*?)</tr>", table)) for table in tables]
  cells = [
    {name: re.findall(r">([\d.]+)</td>", row) for name, row in table.items()} for table in rows
  ]
  assert cells[0] == {"lower-case": ["50", "50"], "number": ["0", "100"]}
  assert cells[1] == {"special": ["100", "0"], "lower-case": ["0", "100"], "number": ["100", "0"]}
  assert kinds.kinds_section(pieces, chosen, kinds.MOST_EXPERTS + 1, ["1", "3"]) == ""
