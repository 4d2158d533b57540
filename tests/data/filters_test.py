import json
import math

import numpy as np
import pytest

from moe_jax.data import filters
from moe_jax.data.filters import Scores, Settings

pytestmark = pytest.mark.unit

KEYS = [str(i) for i in range(8)]


class Texts(list):
  """Documents in memory, with their places as keys."""

  def key(self, i):
    return f"text {i}"


def scores(**changes):
  empty = {"advertising": None, "bits": None, "quality": None, "areas": {}}
  return Scores(**{"lengths": np.arange(1, 9) * 10, **empty, **changes})


def test_shares_by_hand():
  # Of eight documents a quarter is dropped as advertising: the two with the highest scores, where
  # of the three equal ones the later two go first. Of the six that are left, a half is dropped as
  # least fluent: three of them, whatever the dropped ones score. Catches shares of all documents
  # in the second stage, the wrong end of the scores, and bytes of the wrong documents.
  ads = np.array([0.9, 0.1, 0.2, 0.9, 0.3, 0.9, 0.0, 0.1])
  bits = np.array([1.0, 5.0, 4.0, 9.0, math.inf, 9.0, 2.0, 3.0])
  kept, (first, second) = filters.decide(
    scores(advertising=ads, bits=bits, areas={"advertising": 0.75}),
    KEYS,
    Settings(advertising=0.25, fluency=0.5, alpha=None),
  )
  assert np.flatnonzero(kept).tolist() == [0, 6, 7]
  assert first == ("advertising", (8, 360), (6, 260), 0.75)
  assert second[:3] == ("fluency", (6, 260), (3, 160)) and math.isnan(second.roc_area)


def test_quality_comes_last_and_is_sampled():
  # Catches a sampling that ignores the scores, and one that revives dropped documents.
  quality, bits = np.array([1.0] * 4 + [0.0] * 4), np.arange(8.0)
  kept, stages = filters.decide(
    scores(bits=bits, quality=quality), KEYS, Settings(fluency=0.125, alpha=50.0)
  )
  assert [stage.name for stage in stages] == ["fluency", "quality"]
  assert np.flatnonzero(kept).tolist() == [0, 1, 2, 3]


def test_a_corpus_is_scored_and_written(tmp_path):
  # Catches scores of another document, a classifier of the wrong kind, n-grams of the corpus in
  # place of the curated text, and text that is not the document's.
  good = Texts(b"the cat sat on the mat %d" % i for i in range(20))
  ads = Texts(b"buy now cheap offer %d" % i for i in range(20))
  corpus = Texts([b"the cat sat on the mat", b"buy now cheap offer", b"", b"qxzj vkw \xff"])
  found = filters.score(corpus, good, ads, Settings(advertising=0.1, fluency=0.1))
  assert found.lengths.tolist() == [22, 19, 0, 10]
  assert found.quality.argmax() == 0 and found.advertising.argmax() == 1
  assert found.bits.argmin() == 0 and found.bits[2] == math.inf and found.bits[3] > found.bits[0]
  with open(tmp_path / "out", "wb") as file:
    filters.write(corpus, found, np.array([True, False, False, True]), file, "content")
  lines = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
  assert [line["content"] for line in lines] == ["the cat sat on the mat", "qxzj vkw \ufffd"]
  assert lines[0]["quality"] == pytest.approx(found.quality[0], abs=1e-6)
  assert lines[0].keys() == {"content", "advertising", "bits", "quality"}


def test_stages_that_are_left_out_cost_nothing():
  # Catches a classifier that is fitted though nobody asked for its stage.
  found = filters.score(Texts([b"a b"]), None, None, Settings(alpha=None))
  assert found[1:] == (None, None, None, {})


def test_the_area_is_that_of_documents_that_were_held_out():
  # Two kinds that are the same text cannot be told apart: fitted documents would be, by their
  # numbers. Catches an area on the documents of the fit.
  one, other = (Texts(b"w%d" % (i + shift) for i in range(100)) for shift in (0, 100))
  found = filters.score(other, one, None, Settings())
  assert found.areas["quality"] == pytest.approx(0.5, abs=0.1)
