import numpy as np
import pytest

from moe_jax.data.documents import InMemory, Subset, split
from moe_jax.errors import ConfigError

pytestmark = pytest.mark.unit


def _documents(n):
  texts = [b"%d" % i * (i % 4) for i in range(n)]  # Some are empty.
  return InMemory(
    [f"k{i}" for i in range(n)],
    np.frombuffer(b"".join(texts), np.uint8),
    np.cumsum([*map(len, texts)]),
  )


def test_in_memory_gives_documents_back():
  # Catches an end that is off by one.
  assert [_documents(6)[i] for i in range(6)] == [b"", b"1", b"22", b"333", b"", b"5"]


def test_split_is_a_partition_near_the_fraction():
  # Catches a document in both parts or in none, and a fraction that is applied to the wrong part.
  sides = split("s", _documents(2000), 0.1)
  keys = {side: [d.key(i) for i in range(len(d))] for side, d in sides.items()}
  assert sorted(keys["train"] + keys["validation"]) == sorted(f"k{i}" for i in range(2000))
  assert 0.08 < len(keys["validation"]) / 2000 < 0.12


def test_a_document_stays_on_its_side_when_others_come():
  # Catches a split by position or by a random permutation, which would leak held-out text into the
  # training text of later runs.
  few, many = (split("s", _documents(n), 0.3)["validation"] for n in (500, 1000))
  few, many = ({d.key(i) for i in range(len(d))} for d in (few, many))
  assert few == {key for key in many if int(key[1:]) < 500}


def test_both_sides_have_a_document():
  # Catches a small source one of whose parts is empty because of how the keys happen to hash.
  for fraction in (1e-9, 1 - 1e-9):
    sides = split("s", _documents(2), fraction)
    assert len(sides["train"]) == len(sides["validation"]) == 1


def test_all_documents_can_be_held_out():
  # Catches a document that is kept for training, and a single document that is refused.
  for count in (1, 5):
    parts = split("s", _documents(count), 1.0)
    assert len(parts["train"]) == 0 and len(parts["validation"]) == count


def test_errors():
  # Catches a source that is accepted although it cannot be split.
  with pytest.raises(ConfigError, match="data.sources='s': has a single document"):
    split("s", _documents(1), 0.5)
  for fraction in (0, 1.1, -0.1, float("nan")):
    with pytest.raises(ConfigError, match="data.validation_fraction"):
      split("s", _documents(5), fraction)


def test_subset_is_a_sequence():
  # Catches indices that are negative or too large and reach other documents, and an iteration that
  # does not end.
  subset = Subset(_documents(6), [3, 1])
  assert list(subset) == [b"333", b"1"] and subset.key(0) == "k3"
  for i in (-1, 2):
    with pytest.raises(IndexError):
      subset[i]
