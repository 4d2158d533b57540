"""Tests the page that compares runs."""

import json

import pytest
import synthetic

from moe_jax.report.comparison import comparison, names
from moe_jax.report.records import read_workdir

pytestmark = pytest.mark.unit


def two_runs(tmp_path):
  """Returns two workdirs, the second of which has another router and half the first's score."""
  one = synthetic.write_workdir(tmp_path / "one", steps=40)
  two = synthetic.write_workdir(tmp_path / "two", steps=40)
  config = json.loads((two / "config.json").read_text())
  config["model"]["moe"]["router"] = {"name": "st_moe", "st_moe": {"k": 2}, "top_k": {"k": 9}}
  (two / "config.json").write_text(json.dumps(config))
  results = json.loads((two / "results.json").read_text())
  results["bits_per_byte"]["embedded:prose"] = 1.0
  (two / "results.json").write_text(json.dumps(results))
  return one, two


def test_scores_keys_and_curves_of_both_runs_are_shown(tmp_path):
  # Catches a difference in the wrong direction, equal keys that are listed, options of a router
  # that a run does not use, and a chart with the curve of one run only.
  one, two = two_runs(tmp_path)
  text = comparison({"one": read_workdir(one), "two": read_workdir(two)})
  assert "<td>2.000</td><td>1.000 (-50.0%)</td>" in text
  assert "<td><code>model.moe.router.name</code></td><td>top_k</td><td>st_moe</td>" in text
  assert "<td><code>model.moe.router.st_moe.k</code></td><td>-</td><td>2</td>" in text
  assert "model.d_model" not in text and "<td>9</td>" not in text
  loss = text.partition("Training cross-entropy")[2].partition("</figure>")[0]
  assert loss.count("<polyline") + loss.count("<path") >= 2


def test_names_are_as_long_as_they_must_be():
  # Catches two runs with one name, of which a table would show only one.
  assert names(["runs/a", "runs/b"]) == ["a", "b"]
  assert names(["x/run", "y/run/"]) == ["x/run", "y/run"]
  assert len(set(names(["same", "same"]))) == 2


def test_scores_of_two_measures_do_not_stand_in_one_row(tmp_path):
  # Catches nats per target under the head "bits per byte", with a difference that means nothing.
  one, two = two_runs(tmp_path)
  config = json.loads((two / "config.json").read_text())
  config.setdefault("data", {})["objective"] = "span_corruption"
  (two / "config.json").write_text(json.dumps(config))
  results = json.loads((two / "results.json").read_text())
  results["nats_per_target"] = results.pop("bits_per_byte")
  (two / "results.json").write_text(json.dumps(results))
  text = comparison({"one": read_workdir(one), "two": read_workdir(two)})
  assert "embedded:prose, bits per byte</td><td>2.000</td><td>-</td>" in text
  assert "embedded:prose, nats per target</td><td>-</td><td>1.000</td>" in text
