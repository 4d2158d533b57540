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


def test_what_does_not_compare_is_noted(tmp_path):
  # Catches runs of other lengths or texts whose scores stand side by side without a word, and a
  # word about runs that do compare.
  one, two = two_runs(tmp_path)
  both = {"one": read_workdir(one), "two": read_workdir(two)}
  assert "do not compare" not in comparison(both) and "different" not in comparison(both)
  results = json.loads((two / "results.json").read_text())
  (two / "results.json").write_text(json.dumps(results | {"steps": 1234}))
  config = json.loads((two / "config.json").read_text())
  config["train"]["final_eval_batches"] = 3
  (two / "config.json").write_text(json.dumps(config))
  meta = json.loads((two / "meta.json").read_text())
  meta["data"]["embedded:prose"] = "cd" * 32
  (two / "meta.json").write_text(json.dumps(meta))
  text = comparison(both | {"two": read_workdir(two)})
  assert "different numbers of steps (one 40, two 1,234), so that their scores do not" in text
  assert "two on 3 batches of each validation split." in text
  assert "different versions of the text embedded:prose." in text


def test_a_row_of_a_study_has_scores_and_curves(tmp_path):
  # Catches an empty page of the rows of a study, whose curves are in results.json, and a mean with
  # a seed that diverged.
  one, row = two_runs(tmp_path)[0], tmp_path / "row"
  row.mkdir()
  results = {
    "seeds": 3,
    "steps": 4,
    "diverged": [None, 2, None],
    "bits_per_byte": {"embedded:prose": [1.0, None, 2.0]},
    "train": {"step": [2, 4], "loss": [[5, 3], [9, None], [7, 4]], "drop_rate": [[0, 0.5]] * 3},
    "eval": {"step": [4], "bits_per_byte": [[1.0], [None], [2.0]]},
    "load": {"step": [4], "layers": [[[0.25, 0.75]]]},
  }
  (row / "results.json").write_text(json.dumps(results))
  run = read_workdir(row)
  assert [line["loss"] for line in run.train] == [6.0, 3.5]
  assert [line["moe/drop_rate"] for line in run.train] == [0.0, 0.5]
  assert run.train[1]["moe/load"] == [[0.25, 0.75]]
  text = comparison({"one": read_workdir(one), "row": run})
  assert "row is a row of a study: its numbers are means over 3 seeds." in text
  assert "<td>1.500 (-25.0%)</td>" in text and "Validation: mean of the sources" in text


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
