"""The laboratory of balance: its measures, the drift of its logits, and its rows."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.balance_lab import drift, study, table
from moe_jax.routing.balancing import RULES


def test_measures_by_hand():
  # The violation is 1 until step 10, then 0.05, at the jump 1 for 7 steps. Catches stretches that
  # are swapped, and a count that begins at the start of the simulation.
  violations = np.full(drift.AGAIN[-1] + 1, 0.05)
  violations[:10] = violations[drift.AGAIN[0] : drift.AGAIN[0] + 7] = 1.0
  violations[drift.WALKING[-1] - 9 : drift.WALKING[-1] + 1] = 0.55
  measured = drift.measures(violations)
  assert measured == pytest.approx({"steps": 10, "still": 0.05, "walking": 0.15, "after": 7})
  assert drift.first_below(np.ones(3)) == math.inf


def test_the_skew_stands_walks_jumps_and_stands():
  # Catches a skew that drifts everywhere, and seeds that are alike.
  d = drift.skews(0)
  assert (d[: drift.WALKING[0]] == d[0]).all() and (d[drift.AGAIN[0] :] == d[-1]).all()
  steps = np.abs(np.diff(d, axis=0)).max(axis=1)
  assert (steps[drift.WALKING[0] : drift.WALKING[-1]] > 0).all()
  assert steps[drift.AGAIN[0] - 1] > 5 * steps[drift.WALKING[0] : drift.WALKING[-1]].max()
  assert not np.allclose(drift.skews(1)[0], d[0])


@pytest.mark.parametrize("name", ["sign", "loss_sequence", "loss_global"])
def test_a_method_moves_against_the_load(name):
  # The first expert's logits are 3 above those of all others. Catches a loss or a rule with the
  # wrong sign, and counts of another step.
  state, step = drift.method(name, 0.1)
  logits = jnp.zeros((drift.TOKENS, drift.EXPERTS)).at[:, 0].set(3.0)
  after, counts = step(state, logits)
  assert int(counts[0]) == drift.TOKENS and int(counts.sum()) == drift.TOKENS * drift.K
  moved = np.ravel(after.get("bias", after.get("offset")))
  assert moved[0] < 0 < moved[-1]


def test_the_table_takes_the_best_rate():
  # Catches the best at standing still, and a method that is left out.
  def line(method, rate, still, walking):
    return {"method": method, "rate": rate, "seeds": [{"still": still, "walking": walking}] * 2}

  lines = {
    "a": line("sign", 0.1, 0.1, 0.5),
    "b": line("sign", 0.2, 0.3, 0.2),
    "c": line("none", None, 3.0, 3.0),
  }
  best = table.best(lines)
  assert list(best) == ["none", "sign"] and best["sign"]["rate"] == 0.2


def test_each_general_rule_is_simulated():
  # Catches a new rule that the laboratory does not know.
  assert {name for name, rule in RULES.items() if rule.general} < set(drift.RATES)


def test_each_row_has_a_config():
  # Catches keys that do not exist, and a rule that its router cannot follow.
  for row in study.rows().values():
    row.check()
