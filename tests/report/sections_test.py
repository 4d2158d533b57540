"""Tests the words and names in the sections of the report."""

import json
import re

import pytest
import synthetic

from moe_jax.report.records import read_workdir
from moe_jax.report.sections import final_scores, layer_names, page

pytestmark = pytest.mark.unit


def test_layers_are_named_by_their_place_in_the_model(tmp_path):
  # Catches MoE layers that are numbered 0, 1, 2 although they are layers 1, 3, 5 of the model.
  path = synthetic.write_workdir(tmp_path / "run", layers=3, steps=20)
  assert layer_names(read_workdir(path)) == ["layer 1", "layer 3", "layer 5"]
  (path / "routing.json").unlink()
  assert layer_names(read_workdir(path)) == ["layer 1", "layer 3", "layer 5"]
  (path / "config.json").unlink()
  assert layer_names(read_workdir(path)) == ["MoE layer 0", "MoE layer 1", "MoE layer 2"]


def test_final_figures_come_before_those_of_an_evaluation(tmp_path):
  # Catches a report of the last evaluation during training, which covers only some batches,
  # although there is a final one.
  path = synthetic.write_workdir(tmp_path / "run", steps=20)
  assert final_scores(read_workdir(path)) == (
    dict.fromkeys(synthetic.SOURCES, 2.0),
    "on the whole validation split",
  )
  (path / "results.json").unlink()
  bits, where = final_scores(read_workdir(path))
  assert bits["embedded:prose"] == pytest.approx(2.513, abs=1e-3) and "step 20" in where


def test_header_says_what_ran(tmp_path):
  # Catches a header that omits something that is needed to run the experiment again.
  text = page(read_workdir(synthetic.write_workdir(tmp_path / "run", steps=20)))
  for words in (
    "<h1>quickstart</h1>",
    "2026-01-05 10:11 UTC",
    "seed 7",
    "1 x cpu, 2 cores",
    "Python 3.11.7",
    "jax 0.10.2",
    "commit 0123456789",
    "8 experts of width 32 in layers 1, 3",
    "top_k (k = 2)",
    "dropless",
    "1.23 M",
    "8.19 M",
    "5 min",
  ):
    assert words in text, words


def test_experts_without_an_ffn_are_told(tmp_path):
  # Catches a header that omits them, and metrics of theirs without a chart.
  path = synthetic.write_workdir(tmp_path / "run", steps=20)
  config = json.loads((path / "config.json").read_text())
  config["model"]["moe"] |= {"zero_experts": 0, "copy_experts": 2, "constant_experts": 3}
  (path / "config.json").write_text(json.dumps(config))
  lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
  for line in lines:
    line |= {"moe/zero_share": [0.25, 0.5], "moe/ffn_experts_a_token": [1.5, 1.0]}
  (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
  text = page(read_workdir(path))
  assert "8 experts of width 32 and 2 copy, 3 constant without an FFN in layers 1, 3" in text
  assert "Share of experts without an FFN" in text and "Experts with an FFN per token" in text


@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_validation_curve_is_visible_beside_the_ladder(tmp_path, shift):
  # Catches a range of y that ends at the bigram rung although the whole curve is above it.
  path = synthetic.write_workdir(tmp_path / "run", steps=40)
  lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
  for line in lines:
    line |= {
      name: value + shift for name, value in line.items() if name.startswith("bits_per_byte/")
    }
  (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
  figure = re.search(r"Validation: embedded:prose.*?</figure>", page(read_workdir(path))).group()
  assert figure.count("<circle") == 2 and "bigram" in figure


def test_text_that_differs_is_marked(tmp_path):
  # Catches a comparison between different versions of a text that does not say so, and one with a
  # run that is not described.
  path = synthetic.write_workdir(tmp_path / "run", steps=20)
  results = json.loads((path / "results.json").read_text())
  results["compare"]["other_data"] = ["embedded:prose"]
  results["compare"]["about"] = "what a dense <run> reached"
  (path / "results.json").write_text(json.dumps(results))
  text = page(read_workdir(path))
  assert "2.125*" in text and "another version of this text" in text
  assert "what a dense &lt;run&gt; reached" in text


def test_events_are_told_in_order_and_counted(tmp_path):
  # Catches skipped updates and rollbacks that are only visible in metrics.jsonl, and a message
  # whose markup is not escaped.
  text = page(read_workdir(synthetic.write_workdir(tmp_path / "run", steps=200, nan_from=50)))
  assert "gradients that were not finite: 76" in text and "and 26 more in metrics.jsonl" in text
  assert text.index("<td>50</td>") < text.index("<td>52</td>") and "<script>alert" not in text
  assert "<h2>Events" not in page(
    read_workdir(synthetic.write_workdir(tmp_path / "calm", steps=20))
  )


def test_shares_of_the_sources_are_drawn(tmp_path):
  # Catches a report that omits why the sources had other shares than the config says, a line for
  # the losses among the shares, and an empty chart where the shares never changed.
  path = synthetic.write_workdir(tmp_path / "run", steps=20)
  assert "Shares of the sources" not in page(read_workdir(path))
  with (path / "metrics.jsonl").open("a") as file:
    for step, share in ((10, 0.625), (20, 0.75)):
      line = {"share/a": share, "share/<b>": 1 - share, "loss/a": 2.0}
      file.write(json.dumps({"step": step, "kind": "mixture"} | line) + "\n")
  run = read_workdir(path)
  assert [line["step"] for line in run.mixture] == [10, 20]
  text = page(run)
  assert text.count("Shares of the sources</figcaption>") == 1
  assert "a: 0.625 at step 10" in text and "&lt;b&gt;: 0.25 at step 20" in text
  assert "2 at step 10" not in text


def test_a_capped_final_evaluation_says_so(tmp_path):
  # Catches the words "on the whole validation split" for an evaluation of a part of it.
  path = synthetic.write_workdir(tmp_path / "run", steps=20)
  config = json.loads((path / "config.json").read_text())
  config["train"]["final_eval_batches"] = 3
  (path / "config.json").write_text(json.dumps(config))
  assert final_scores(read_workdir(path))[1] == "on 3 batches of each validation split"
