import json

import numpy as np
import planted
import pytest

from moe_jax.analysis.results import analyse
from moe_jax.analysis.specialisation import MEASURES

pytestmark = pytest.mark.unit


def test_all_tables_of_a_stack():
  # Catches layers or domains in another order, NaN, which JSON does not have, and a statistic whose
  # interval is missing.
  recorded = planted.record(planted.by_token, layers=3)
  before = recorded.first.copy()
  before[1] = (before[1] + 1) % planted.EXPERTS
  result = analyse(recorded, before)
  assert json.loads(json.dumps(result, allow_nan=False)) == result
  assert [[d["changed"] for d in layer] for layer in result["churn"]] == [[0, 0], [1, 1], [0, 0]]
  assert np.sum(result["by_domain"], axis=(1, 2)).tolist() == [len(recorded.ids)] * 3
  assert np.array(result["by_domain"])[2, 1].tolist() == (
    np.bincount(recorded.first[2][recorded.domain == 1]).tolist()
  )
  assert len(result["coactivation"]) == 2 and np.array(
    result["coactivation"][0]["counts"]
  ).shape == (4, 4)
  for layer in result["explained"]:
    assert all(layer[name]["half_width"] > 0 for name in MEASURES if name != "kind")
  assert result["sharpness"]["entropy"] == pytest.approx([1.2, 1.1, 1.0])
  assert result["sharpness"]["entropy_half_width"] == pytest.approx([0] * 3, abs=1e-12)
  # All tokens are letters, whose experts are about uniform.
  (entropy,) = [value for value in result["entropy_by_kind"][0] if value is not None]
  assert entropy == pytest.approx(np.log(4), abs=0.1)
  # Expert 2 gets the tokens c, g, k and o more often than the others.
  assert set(result["typical"][0][2]) == set("cgko")


def test_no_churn_without_a_second_checkpoint():
  # Catches an empty table that the page would show.
  assert analyse(planted.record(planted.by_nothing, rows=2, length=8))["churn"] is None
