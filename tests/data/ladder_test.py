"""Tests the ladder against a slow reference, by hand, and on texts of known entropy."""

import collections
import json
import math
import random

import numpy as np
import pytest

from moe_jax.data.ladder import (
  ORDERS,
  WittenBell,
  cached_ladder,
  ladder,
  lzma_bits_per_byte,
  witten_bell,
)

pytestmark = pytest.mark.unit

TRAIN = [b"the cat sat on the mat", b"", b"a man, a plan, a canal", b"\x00\xff\x00\xff", b"the"]
VALIDATION = [b"the hat sat", b"", b"panama \x00\xff!", b"t"]


def slow_witten_bell(train, validation, n):
  """Returns the bits per byte of the n-gram model by the recursion, one byte at a time."""
  follow = [collections.defaultdict(collections.Counter) for _ in range(n)]

  def context(document, i, k):
    return (("^",) * k + tuple(document))[i : i + k]

  for document in train:
    for i, byte in enumerate(document):
      for k in range(n):
        follow[k][context(document, i, k)][byte] += 1
  bits = total = 0
  for document in validation:
    for i, byte in enumerate(document):
      p = 1 / 256
      for k in range(n):
        seen = follow[k].get(context(document, i, k))
        if seen:
          p = (seen[byte] + len(seen) * p) / (seen.total() + len(seen))
      bits -= math.log2(p)
      total += 1
  return bits / total


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_equals_the_slow_reference(n):
  # Catches contexts that cross documents, a start mark that is predicted, and T(h) in place of
  # c(h).
  assert witten_bell(TRAIN, VALIDATION, 5)[n - 1] == pytest.approx(
    slow_witten_bell(TRAIN, VALIDATION, n), rel=1e-12
  )


def test_unigram_by_hand():
  # With c(a) = 3, c(b) = 1 and T = 2: p(a) = (3 + 2/256) / 6, p(z) = (2/256) / 6. Catches a missing
  # floor of 1/256.
  expected = -(math.log2((3 + 2 / 256) / 6) + math.log2((2 / 256) / 6)) / 2
  assert witten_bell([b"aaab"], [b"az"], 1)[0] == pytest.approx(expected)


def test_no_training_text_is_uniform():
  # Catches a division by zero for contexts that do not occur in the training text.
  assert ladder([], [b"abc"])["5-gram"] == 8.0


def test_rungs_fall_on_markov_text_and_stay_on_noise():
  # Catches rungs in the wrong order. A second-order Markov text helps the trigram most, and noise
  # cannot be predicted.
  rng = random.Random(0)
  text = bytearray(b"ab")
  for _ in range(20_000):
    text.append(ord("a") + (3 * text[-1] + 4 * text[-2] + (rng.random() < 0.1)) % 16)
  figures = ladder([bytes(text[:18_000])], [bytes(text[18_000:])])
  assert list(figures) == [*ORDERS, "lzma"]
  assert figures["unigram"] > figures["bigram"] > figures["trigram"] + 0.4
  noise = ladder([rng.randbytes(5000)], [rng.randbytes(2000)])
  assert all(7.9 < value < 9 for value in noise.values())


def test_lzma_reaches_back_to_the_first_byte():
  # Catches a dictionary that is too small. The two copies are 9 MiB of zeros apart, which is more
  # than a dictionary of 8 MiB holds.
  rng = random.Random(0)
  copy = rng.randbytes(20_000)
  assert lzma_bits_per_byte([copy + bytes(9 << 20)], [copy]) < 0.1


def test_cache_is_read_keyed_and_survives_damage(tmp_path):
  # Catches a key that is ignored, and a truncated file of the cache that ends the run.
  calls = []

  def documents():
    return calls.append(1) or (TRAIN, VALIDATION)

  first = cached_ladder("k", documents, tmp_path / "new")
  assert cached_ladder("k", documents, tmp_path / "new") == first and len(calls) == 1
  cached_ladder("other", documents, tmp_path / "new")
  assert len(calls) == 2
  for path in (tmp_path / "new").glob("*.json"):
    assert first.items() < json.loads(path.read_text()).items()
    path.write_text('{"unigram": ')
  assert cached_ladder("k", documents, tmp_path / "new") == first and len(calls) == 3


def _figures(unigram):
  return {
    "unigram": unigram,
    "bigram": 2.5,
    "trigram": 2.0,
    "4-gram": 1.5,
    "5-gram": 1.25,
    "lzma": 1.0,
  }


@pytest.mark.parametrize(
  "damage",
  [
    lambda text: json.dumps(_figures(3.0)),
    lambda text: json.dumps(_figures(float("nan"))),
    lambda text: "[" * 100_000,
    lambda text: text.replace(text[13:16], "9.9"),
    lambda text: text.replace('"lzma"', '"lzmb"'),
    lambda text: "\xff",
    lambda text: json.dumps(_figures("3.0")),
    lambda text: "[1]",
    lambda text: "null",
  ],
)
def test_a_damaged_cache_is_computed_anew_and_told(tmp_path, capfd, damage):
  # Catches figures of the cache that are wrong: another digit, NaN, a string, or an old file
  # without a digest.
  first = cached_ladder("k", lambda: (TRAIN, VALIDATION), tmp_path)
  path = next(tmp_path.glob("ladder-*.json"))
  path.write_text(damage(path.read_text()), encoding="latin-1")
  assert cached_ladder("k", lambda: (TRAIN, VALIDATION), tmp_path) == first
  assert f"{path} is damaged" in capfd.readouterr().err
  assert cached_ladder("k", lambda: pytest.fail("was not written again"), tmp_path) == first


def test_a_cache_that_cannot_be_written_is_only_slower(tmp_path):
  # Catches an error, or an unfinished file that is left behind, if the figures cannot be stored.
  (tmp_path / "file").write_text("")
  assert cached_ladder("k", lambda: (TRAIN, VALIDATION), tmp_path / "file") == ladder(
    TRAIN, VALIDATION
  )


def test_bits_of_each_document():
  # The mean over documents, weighted by their bytes, is the figure of all. Catches bytes that count
  # for a neighbour.
  full = [document for document in VALIDATION if document]
  bits = WittenBell(TRAIN, 3).bits_per_byte([*full, b""])
  assert len(full) > 1 and np.isnan(bits[-1])
  mean = np.average(bits[:-1], weights=[len(document) for document in full])
  assert mean == pytest.approx(witten_bell(TRAIN, VALIDATION, 3)[2])
  assert bits[0] == pytest.approx(WittenBell(TRAIN, 3).bits_per_byte(full[:1])[0])
