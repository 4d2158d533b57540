"""Tests the reader of the files of a workdir."""

import json
import math

import numpy as np
import pytest

from moe_jax.report.records import (
  Curve,
  curve,
  layer_names,
  measure,
  number,
  numbers,
  page_layers,
  read_workdir,
  smooth,
  thin,
)

pytestmark = pytest.mark.unit


def test_last_line_of_a_step_wins_and_steps_are_sorted(tmp_path):
  # Catches curves that run backwards if a resumed run has logged steps again.
  lines = [
    {"step": s, "kind": "train", "loss": l}
    for s, l in ((2, 5), (4, 4), (6, 3), (4, 3.5), (6, 2.5), (8, 2))
  ]
  broken = '\nnot json\n{"kind": "train"}\n[1]\n{"st'
  (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + broken)
  found = curve(read_workdir(tmp_path).train, "loss")
  assert found.steps.tolist() == [2, 4, 6, 8] and found.values.tolist() == [5, 3.5, 2.5, 2]


def test_curve_of_arrays_takes_the_last_shape():
  # Catches np.stack of ragged lines, which a run has if it resumes with another number of experts.
  lines = [
    {"step": 1, "x": [[1, 2]]},
    {"step": 2, "x": [[1, None, 3]]},
    {"step": 3, "x": [[4, 5, "NaN"]]},
    {"step": 4},
  ]
  found = curve(lines, "x")
  assert found.steps.tolist() == [2, 3]
  np.testing.assert_array_equal(found.values, [[[1, np.nan, 3]], [[4, 5, np.nan]]])
  assert curve(lines, "y") is None


def test_what_an_encoder_decoder_is_judged_by_and_how_its_layers_are_called(tmp_path):
  # Catches layers of the decoder under the names of the encoder's, layers without experts, and a
  # measure in bits per byte although only a part of the text is predicted.
  model = {
    "family": "encoder_decoder",
    "num_encoder_layers": 4,
    "num_layers": 2,
    "moe": {"first": 1, "every": 2},
  }
  (tmp_path / "config.json").write_text(
    json.dumps({"model": model, "data": {"objective": "span_corruption"}})
  )
  (tmp_path / "routing.json").write_text(
    json.dumps({"layers": [1, 3], "pages": [{"experts": [[0], [1]]}]})
  )
  (tmp_path / "metrics.jsonl").write_text(
    json.dumps({"step": 1, "kind": "train", "moe/load": [[0.5, 0.5]] * 3})
  )
  run = read_workdir(tmp_path)
  assert (
    layer_names(run) == ["encoder layer 1", "encoder layer 3", "decoder layer 1"]
    and page_layers(run) == 2
  )
  assert measure(run) == ("nats_per_target", "nats per target")
  dense = model | {"num_layers": 6, "moe": {"first": 1, "every": 2, "dense_layers": [3]}}
  (tmp_path / "config.json").write_text(json.dumps({"model": dense}))
  names = ["encoder layer 1", "decoder layer 1", "decoder layer 5"]
  assert layer_names(read_workdir(tmp_path)) == names
  (tmp_path / "config.json").write_text(
    json.dumps({"model": model | {"num_encoder_layers": 0, "num_layers": 3}})
  )
  # This config has 1 + 1 layers with experts, but the metrics have 3, so their indices are unknown.
  assert layer_names(read_workdir(tmp_path)) == ["MoE layer 0", "MoE layer 1", "MoE layer 2"]
  assert measure(read_workdir(tmp_path)) == ("bits_per_byte", "bits per byte")


def test_numbers():
  # Catches an exception for null or text, and a ragged list that is accepted.
  assert math.isnan(numbers(None)) and math.isnan(numbers("x"))
  assert math.isnan(number(10**400)) and np.isnan(numbers([10**400, 1])[0])
  assert numbers([[1, 2], [3]]) is None
  # Each of the two inner lists is ragged, so that both are None.
  assert numbers([[[1], [2, 3]], [[1], [2, 3]]]) is None


def test_thin_keeps_means_and_the_last_step():
  # Catches a NaN that spoils the mean of its group, and a curve that ends before the run does.
  data = Curve(np.arange(1.0, 11), np.array([1, np.nan, 3, 3, 5, 5, 7, 7, np.nan, np.nan]))
  out = thin(data, 5)
  np.testing.assert_array_equal(out.steps, [2, 4, 6, 8, 10])
  np.testing.assert_array_equal(out.values, [1, 3, 5, 7, np.nan])
  assert thin(data, 10) is data


def test_smooth_is_unbiased_and_skips_gaps():
  # Catches an average that starts at 0, and a NaN that spoils all later values.
  out = smooth(np.array([np.nan, 4.0, 4.0, np.nan, 4.0, 8.0]), 4)
  assert math.isnan(out[0]) and out[1:5].tolist() == [4.0] * 4 and 4 < out[5] < 8
