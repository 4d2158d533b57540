"""Checks the rows of the balance losses, their table, and that the README shows the results."""

import numpy as np
import pytest

from experiments.common import sweep, tables
from experiments.lstm_moe import study, table

pytestmark = pytest.mark.unit


def test_rows():
  # Catches rows that share a name, a seed or a weight that does not arrive, and a size that is not
  # the paper's.
  assert len(study.DESK) == len(study.PAPER) * study.SEEDS == 18 and len(study.FULL) == 6
  row = study.DESK["importance_0.2_load_0_seed2"].arguments()
  assert {
    "--config.seed=2",
    "--config.model.moe.importance_loss=0.2",
    "--config.model.moe.load_loss=0.0",
    "--config.train.steps=400",
  } < set(row)
  assert all(row.config == "configs/lstm_moe.py:moe_256" for row in study.FULL.values())


def test_a_table_by_hand():
  # Two seeds: 1 and 3 are 2 ± 1.41; nats of 0 and ln 4 a byte are a perplexity of 2. Catches:
  # population deviations, columns exchanged, a perplexity that is averaged over sources after exp.
  seed = {
    "steps": 4,
    "tokens": 2e6,
    "parameters": {"total": 3e6, "activated": 1e6},
    "python": "3.11",
    "date": "2000-01-31",
    "versions": {"jax": "0", "flax": "1"},
    "hardware": "cpu",
    "cv_load": 0.25,
    "max_over_mean": 1.5,
    "evaluated_max_over_mean": 2.5,
    "perplexity": study.perplexity({"loss": {"a": 0.0, "b": np.log(4.0)}}),
  }
  seeds = [
    seed | {"cv_importance": x, "wall_seconds": 60.0, "curve": [[20, x], [40, 2 * x]]}
    for x in (1.0, 3.0)
  ]
  made = table.table({(0.2, 0.0): seeds})
  assert "| 0.2 | 0 | 2.00 ± 0.00 | 2.00 ± 1.41 | 0.25 ± 0.00 | 1.50 ± 0.00 | 2.50 ± 0.00 |" in made
  assert (
    "| 0 | 0 | 39.8 | 3.04 | 3.01 | 17.80 |" in made
    and "2 seeds" in made
    and "2000-01-31, Python 3.11" in made
  )
  assert "(0.2, 0)" in table.figure({(0.2, 0.0): seeds})


def test_the_readme_shows_the_results():
  # Catches a table typed by hand, and results replaced without `python -m experiments lstm_moe
  # write`.
  text, found = table.README.read_text(), table.runs()
  assert [len(seeds) for seeds in found.values()] == [study.SEEDS] * len(study.PAPER)
  made = tables.replace(text, "lstm_moe", table.table(found))
  assert made == text and table.FIGURE.read_text() == table.figure(found)
  assert not sweep.unfinished(study.DESK, table.RESULTS)


def test_the_losses_balance_as_the_readme_says():
  # Catches results of other runs put under the same words.
  def of(weights, key):
    return np.array([seed[key] for seed in table.runs()[weights]])

  for weights in set(study.PAPER) - {(0.0, 0.0)}:
    assert of(weights, "max_over_mean").max() < of((0.0, 0.0), "max_over_mean").min()
    assert of(weights, "cv_load").max() < of((0.0, 0.0), "cv_load").min()
