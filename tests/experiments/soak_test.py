"""Runs the soak and two faults in short: a kill, a flipped bit, and a gradient that is NaN."""

import pytest

from experiments.reliability import faults, soak

pytestmark = pytest.mark.smoke


def test_a_run_that_is_killed_ends_like_one_that_was_not(tmp_path):
  # Catches anything that a checkpoint forgets while noise, dropout, a moving bias and the guard are
  # on.
  small = {"model__num_layers": 2, "train__steps": 20, "train__accumulate_steps": 1}
  (one,) = soak.soak(tmp_path, runs=1, kills=1, seed=2, processes=1, warm=False, **small)
  assert one["kills"] and one["equal"], one
  assert "| **all** | 1 | **1** |" in soak.table([one], 3, 60.0)


def test_runs_that_differ_are_told():
  # Catches a table that says 100 of 100 whatever happened.
  found = [
    {"number": 0, "kills": 2, "in a save": 1, "equal": True, "said": ""},
    {"number": 1, "kills": 2, "in a save": 0, "equal": False, "said": "weights differ"},
  ]
  text = soak.table(found, 0, 60.0)
  assert (
    "| 2 | 2 | 1 |" in text and "Run 1: weights differ." in text and "4 kills, 1 of them" in text
  )


def test_faults_are_told_and_cost_nothing(tmp_path):
  # Catches a damaged checkpoint that is trained on, and divergence that costs the good ones or does
  # not name its tensor.
  lab = faults.Lab(tmp_path)
  chosen = ("a bit flips in the newest checkpoint", "NaN in one expert's gradient")
  rows = [
    faults.row(fault, lab, number)
    for number, fault in enumerate(faults.FAULTS)
    if fault.name in chosen
  ]
  assert len(rows) == 2 and all(one["good"] and one["lost"] == "nothing" for one in rows), rows
  assert any("is repeats/layer_1/ffn/up" in one["told"] for one in rows)
  assert "2 of 2 rows are as they should be" in faults.table(rows)
