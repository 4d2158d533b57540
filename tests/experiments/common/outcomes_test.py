"""Checks what a finished row says on the terminal, and what the studies share with it."""

import json

import numpy as np
import pytest

from experiments.common import journal, outcomes, plots, sweep, tables

pytestmark = pytest.mark.unit


def line(*bits, diverged=None):
  return {"mean_bits_per_byte": list(bits), "diverged": diverged or [None] * len(bits)}


def test_means_and_differences():
  # 2, 2.1 and 2.2: mean 2.1, sample deviation 0.1, error 0.1 / sqrt 3 = 0.058. Independent:
  # 0.058 * sqrt 2 = 0.082; paired, all differences are 0.5. Catches: a population's deviation,
  # errors that are added, pairs of different seeds.
  mine, other = line(2.0, 2.1, 2.2), line(1.5, 1.6, 1.7)
  first = "2.100 ± 0.058 bits per byte over 3 of 3 seeds; +0.500 ± "
  assert outcomes.describe(mine, {"base": other}) == f"{first}0.082 compared with base"
  paired = outcomes.describe(mine, {"base": other}, paired=True)
  assert paired == f"{first}0.000 compared with base"


def test_a_seed_that_diverged_does_not_count():
  # Catches a measure after divergence in the mean, None as a number.
  words = outcomes.describe(line(2.0, 9.0, None, diverged=[None, 7, 3]), {})
  assert words == "2.000 bits per byte over 1 of 3 seeds"
  assert outcomes.describe(line(None, diverged=[3]), {}) == "all seeds diverged"


def test_lines_of_other_programs():
  # Catches a run of one seed whose sources are not averaged, two measures that are compared, and a
  # dry run that is called finished though it does not fit.
  one = {"bits_per_byte": {"a": 2.0, "b": 3.0}}
  other = {"nats_per_target": {"a": 2.0}}
  assert outcomes.describe(one, {"other": other}) == "2.500 bits per byte"
  assert outcomes.describe({"error": "does not fit"}, {}) == "does not fit"
  assert outcomes.describe({"diverged": "at step 3"}, {}) == "at step 3"


@pytest.mark.parametrize(
  "mine, other, words",
  [
    ({"steps": 30}, {"steps": 400}, "which has 400 steps and not 30"),
    ({"steps": 4, "tokens": 80}, {"steps": 4, "tokens": 1600}, "which has 1,600 tokens and not 80"),
    (
      {"data": {"a": "1"}},
      {"data": {"a": "2"}},
      "which was trained on another version of the text",
    ),
  ],
)
def test_rows_of_other_lengths_are_not_compared(mine, other, words):
  # Catches a run of 30 steps whose loss is said to be 1.5 above that of 400 steps.
  mine, other = line(3.0, 3.0) | mine, line(1.5, 1.5) | other
  said = outcomes.describe(mine, {"base": other})
  assert said == f"3.000 ± 0.000 bits per byte over 2 of 2 seeds; not compared with base, {words}"
  assert not outcomes.difference(mine, other)
  assert outcomes.difference(mine, mine) == "+0.000 ± 0.000"


def test_curves_of_rows():
  # Catches a crash at a loss that is not finite, and an empty figure of rows without curves.
  curve = {"train": {"step": [1, 2, 3], "loss": [[3.0, 2.0, None], [3.5, 2.5, 2.0]]}}
  lines = {"mine": curve, "one": {"bits_per_byte": {"a": 1.0}}}
  page = plots.page("changed", lines, {"mine": "1.5 < 2"})
  assert "mine" in page and "<svg" in page and "1.5 &lt; 2" in page
  assert [line.label for line in plots.loss_curves(lines)] == ["mine"]
  assert "<svg" not in plots.page("changed", {"one": {}}, {})


def test_a_shorter_row_has_a_shorter_warmup():
  # Catches a row of fewer steps than its warmup, which a run refuses.
  row = sweep.Row("quickstart", {"optimizer.warmup_steps": 100}, seeds=2)
  overrides = row.shortened(80).overrides
  assert overrides == {"optimizer.warmup_steps": 10, "train.steps": 80}


def test_tables():
  # Catches columns that are not aligned, text outside of the markers that is lost.
  made = tables.markdown(["a", "b"], [["x", "1"]])
  assert made == "| a | b |\n| --- | ---: |\n| x | 1 |"
  text = "before\n<!-- table:t -->\nold\n<!-- /table:t -->\nafter"
  assert tables.replace_all(text, {"t": made}) == text.replace("old", made)
  assert (
    tables.text(["", "bits"], [["row", "1.5"], ["r", "10"]]) == "     bits\nrow   1.5\nr      10"
  )


def test_a_journal_is_rewritten_at_once(tmp_path):
  # Catches a line that is lost or doubled, and a temporary file that stays.
  file = tmp_path / "results.jsonl"
  for row in "ab":
    journal.append(file, {"row": row, "value": float(np.float32(0.5))})
  journal.rewrite(file, [entry | {"value": 1} for entry in journal.load(file).values()])
  assert [json.loads(text)["value"] for text in file.read_text().splitlines()] == [1, 1]
  assert list(tmp_path.iterdir()) == [file]
