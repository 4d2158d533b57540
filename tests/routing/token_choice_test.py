"""Tests the priority of assignments and the padding in plans of token choice."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import RoutingContext
from moe_jax.routing.token_choice import PRIORITIES, leak, token_choice

pytestmark = pytest.mark.unit

# Three tokens have two choices each among four experts. Token 1's second choice names no expert.
EXPERT = jnp.array([[0, 1], [2, 4], [3, 0]])
GATE = jnp.array([[0.6, 0.4], [0.9, 0.1], [0.7, 0.3]])
SCORE = jnp.array([0.1, 0.3, 0.2])


def _plan(priority, valid=None):
  plan = token_choice(EXPERT, GATE, RoutingContext(valid=valid), 4, priority=priority, score=SCORE)
  assert plan.num_experts == 4
  return [
    (int(t), int(e), round(float(g), 3))
    for t, e, g in zip(plan.token, plan.expert, plan.gate, strict=True)
  ]


def test_orders():
  # Catches orders that are mixed up, and an assignment to no expert with a nonzero gate.
  assert _plan("choice") == [
    (0, 0, 0.6),
    (1, 2, 0.9),
    (2, 3, 0.7),
    (0, 1, 0.4),
    (1, 4, 0.0),
    (2, 0, 0.3),
  ]
  assert _plan("token") == [
    (0, 0, 0.6),
    (0, 1, 0.4),
    (1, 2, 0.9),
    (1, 4, 0.0),
    (2, 3, 0.7),
    (2, 0, 0.3),
  ]
  assert _plan("gate") == [
    (1, 2, 0.9),
    (2, 3, 0.7),
    (0, 0, 0.6),
    (1, 4, 0.0),
    (2, 0, 0.3),
    (0, 1, 0.4),
  ]


@pytest.mark.parametrize("priority", PRIORITIES)
def test_padding(priority):
  # Catches padding that names an expert, or that comes before real tokens with priority "gate".
  plan = _plan(priority, jnp.array([True, False, True]))
  assert [(e, g) for t, e, g in plan if t == 1] == [(4, 0.0)] * 2
  assert [row for row in plan if row[0] != 1] == [row for row in _plan(priority) if row[0] != 1]
  if priority == "gate":
    assert [t for t, _, _ in plan] == [2, 0, 1, 2, 0, 1]


def test_leak():
  # Catches first choices that are declared safe with batch priority, and K = 1 that is declared to
  # leak.
  assert [leak(k, p) for k, p in ((1, "choice"), (2, "choice"), (2, "token"), (1, "gate"))] == [
    "no",
    "overflow",
    "no",
    "yes",
  ]


def test_without_a_score():
  # Catches a score that is required for priorities other than "gate".
  plan = token_choice(EXPERT, GATE, RoutingContext(valid=jnp.array([True, True, False])), 4)
  np.testing.assert_array_equal(plan.expert, [0, 2, 4, 1, 4, 4])
