import planted
import pytest

from moe_jax.analysis import findings
from moe_jax.analysis.results import analyse

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
  "plant, options, verdict",
  [
    (planted.by_token, {}, findings.HOLDS),
    (planted.by_domain, {}, findings.FAILS),
    (planted.by_nothing, {}, findings.UNDECIDED),
    (planted.by_token, {"domains": 1}, findings.UNDECIDED),
    (planted.by_token, {"rows": 1}, findings.UNDECIDED),  # no interval
  ],
)
def test_lexical_against_topical(plant, options, verdict):
  # Catches a verdict about random experts, about one topic, or with no interval, and signs that are
  # exchanged.
  result = analyse(planted.record(plant, **options))
  found = result["findings"]["lexical"]
  assert found["verdict"] == verdict
  words = findings.sentences(result)["lexical"]
  assert ("one domain only" in words) == (len(result["domains"]) == 1)
  if len(result["domains"]) > 1:
    assert f"{found['of_expert']['lexical']:.1%} (chance" in words


def test_a_label_with_many_values_must_also_win_by_share():
  # Catches a rule that drops the second comparison: the two disagree, so that nothing is decided.
  import numpy as np

  def shares(most):
    ones = np.ones((1, 5))
    value = np.array([[0, 0, 0, 0.4, 0.3]])
    replicates = np.stack([value, value + 1e-3])
    return findings.Shares(value, np.array([[1, 1, 1, *most]]), 0 * ones, 0 * ones, replicates)

  assert findings.lexical(shares((1.0, 1.0)), 2)["verdict"] == findings.HOLDS
  found = findings.lexical(shares((1.0, 0.5)), 2)
  assert found["verdict"] == findings.UNDECIDED
  assert found["of_most"]["topical"] == pytest.approx(0.6)


@pytest.mark.parametrize(
  "entropy, verdict",
  [
    ([2.0, 1.0], findings.UNDECIDED),
    ([4.0, 3.0, 2.0, 1.0], findings.HOLDS),
    ([1.0, 2.0, 3.0, 4.0], findings.FAILS),
    ([4.0, 3.0, 1.0, 2.0], findings.UNDECIDED),
  ],
)
def test_deeper_layers(entropy, verdict):
  # Catches entropy in place of sharpness, and a claim from two layers.
  found = findings.sharper(entropy, [1 / value for value in entropy])
  assert found["verdict"] == verdict
  assert found["spearman"] == pytest.approx(found["spearman_of_top"])
