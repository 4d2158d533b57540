import numpy as np
import pytest

from moe_jax import data as data_package
from moe_jax.data.quality import FEATURES, Classifier, features, pareto_keeps, roc_area

pytestmark = pytest.mark.unit


def test_features_by_hand():
  # "a b a" has the words a (twice) and b, and the pairs "a b" and "b a". Catches counts that are
  # not damped, rows of another length, case that matters, and pairs that are left out.
  rows = features([b"A b a", b"...", b"b b"]).toarray()
  assert rows.shape == (3, FEATURES)
  values = np.sort(rows[0][rows[0] > 0])
  damped = np.log([2, 2, 2, 3])
  np.testing.assert_allclose(values, damped / np.linalg.norm(damped))
  assert not rows[1].any()
  # b and "b b".
  assert np.count_nonzero(rows[2]) == 2 and np.count_nonzero(rows[0] * rows[2]) == 1


def test_the_area_under_the_curve_by_hand():
  # Of the six pairs, 0.9 wins against both, 0.5 wins one and ties one, 0.1 loses both: 3.5 / 6.
  # Catches ties that count as wins or losses, and an area of the wrong side.
  area = roc_area(np.array([0.9, 0.5, 0.1]), np.array([0.5, 0.3]))
  assert area == pytest.approx(3.5 / 6)


def test_the_pareto_rule_by_hand():
  # With alpha = 2, a document of score 0.5 is kept with probability 1.5^-2 = 4/9, one of score 0
  # with 1/4, and one of score 1 always. Catches a rule with score in place of 1 - score, another
  # exponent, and draws that depend on the order of the documents.
  keys = [str(i) for i in range(4000)]
  for score, wanted in ((1.0, 1.0), (0.5, 4 / 9), (0.0, 0.25)):
    kept = pareto_keeps(np.full(4000, score), keys, alpha=2.0)
    assert kept.mean() == pytest.approx(wanted, abs=0.03)
  scores = np.linspace(0, 1, 4000)
  kept = pareto_keeps(scores, keys, alpha=2.0)
  np.testing.assert_array_equal(pareto_keeps(scores[::-1], keys[::-1], alpha=2.0)[::-1], kept)
  assert (pareto_keeps(scores, keys, alpha=2.0, seed=1) != kept).any()


def test_the_classifier_minimises_its_loss():
  # Catches a gradient that is not that of the loss: the intercept of two kinds without any word in
  # common, of which one has more documents, is 0 by symmetry, and the scores are mirrored.
  classifier = Classifier([b"good"] * 3, [b"bad"])
  good, bad, neither = classifier.scores([b"good", b"bad", b"other"])
  assert good > 0.6 > 0.5 > bad
  assert good + bad == pytest.approx(1.0, abs=1e-3) and neither == pytest.approx(0.5, abs=1e-3)


def test_two_domains_are_told_apart(data, corpus_cache):
  # Catches a classifier that learns nothing that holds for other documents.
  data.cache_dir, data.validation_fraction = corpus_cache, 0.3
  prose, code, _ = data_package.make_sources(data)
  parts = {
    (kind, side): [document[:1500] for document in list(source.documents(side))[:60]]
    for kind, source in (("prose", prose), ("code", code))
    for side in ("train", "validation")
  }
  classifier = Classifier(parts["prose", "train"], parts["code", "train"])
  scores = [classifier.scores(parts[kind, "validation"]) for kind in ("prose", "code")]
  assert roc_area(*scores) > 0.95
