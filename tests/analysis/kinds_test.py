import numpy as np
import pytest

from moe_jax.analysis import kinds

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
  "piece, expected",
  [
    (None, "special"),
    (" \n", "white space"),
    ("", "non-ASCII"),  # a part of a character
    ("the", "lower-case"),
    (" The", "capitalised"),
    ("é", "lower-case"),
    ("NASA", "capitalised"),
    ("42", "number"),
    ("3.14", "number"),
    (",", "punctuation"),
    ("()", "punctuation"),
    (" ==", "code"),
    ("{", "code"),
    ("x1", "code"),
    ("_load", "code"),
    ("readLine", "code"),
    ("don't", "other"),
    ("→", "non-ASCII"),
    ("世", "non-ASCII"),  # a letter that is neither lower-case nor capitalised
  ],
)
def test_kinds_of_tokens(piece, expected):
  # Catches a subword whose leading space makes it another kind, accented letters that count as
  # symbols, and letters without case that count as capitalised.
  assert kinds.kind(piece) == expected and expected in kinds.KINDS


def test_kinds_of_many_tokens():
  # Catches an index into another list.
  assert [kinds.KINDS[i] for i in kinds.kinds_of(["a", None, "1", "a"])] == [
    "lower-case",
    "special",
    "number",
    "lower-case",
  ]
  assert kinds.kinds_of([]).dtype == np.dtype(int)
