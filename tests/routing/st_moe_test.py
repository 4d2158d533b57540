"""Tests ST-MoE's top-n by hand and against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from oracles.compare import check_appended_padding, check_oracle, draw, gradient, run
from oracles.st_moe import st_moe as oracle

from moe_jax.errors import ConfigError
from moe_jax.routing import RoutingContext
from moe_jax.routing.st_moe import ROUTER, st_moe

pytestmark = pytest.mark.numerics

PROBS = np.array([[0.5, 0.3, 0.2], [0.3, 0.1, 0.6], [0.8, 0.15, 0.05], [0.1, 0.7, 0.2]])
LOGITS = jnp.log(jnp.asarray(PROBS, jnp.float32))


def _triples(plan):
  return [(t, e, round(g, 4)) for t, e, g in reference.assignments(plan)]


def test_threshold_by_hand():
  # The gates over the best two experts are 0.5/0.8 = 0.625 and 0.375, 0.6667 and 0.3333, 0.8421 and
  # 0.1579, and 0.7778 and 0.2222. All except for token 2's second choice are above 0.21. Catches a
  # threshold on p (token 3's 0.2 is not above 0.21), and gates that are renormalised over the kept
  # choices (token 2 would have 1).
  plan = run(st_moe, LOGITS, policy="threshold", threshold=0.21)
  assert _triples(plan) == [
    (0, 0, 0.625),
    (1, 2, 0.6667),
    (2, 0, 0.8421),
    (3, 1, 0.7778),
    (0, 1, 0.375),
    (1, 0, 0.3333),
    (3, 2, 0.2222),
  ]


def test_the_best_is_kept_below_the_threshold():
  # With three experts per token, no gate reaches the threshold of 0.9. Catches a policy that is
  # applied to the first choice.
  plan = run(st_moe, LOGITS, k=3, policy="threshold", threshold=0.9)
  assert _triples(plan) == [(0, 0, 0.5), (1, 2, 0.6), (2, 0, 0.8), (3, 1, 0.7)]


def test_batch_priority_by_hand():
  # First choices have p = 0.4, 0.45 and 0.8, so the order is tokens 2, 1 and 0 in both rounds. By
  # g, which is 0.571, 0.506 and 0.889, token 0 would come before token 1. By the gate of each
  # choice, token 1 would come first in the second round. Catches these orders, and an order by
  # position.
  logits = jnp.log(jnp.array([[0.4, 0.3, 0.3], [0.45, 0.44, 0.11], [0.1, 0.1, 0.8]]))
  plan = run(st_moe, logits, priority="gate")
  assert [a[:2] for a in _triples(plan)] == [(2, 2), (1, 0), (0, 0), (2, 0), (1, 1), (0, 1)]


def test_switch_at_one_expert_a_token():
  # Catches a gate that is the constant 1, which has no gradient.
  plan = run(st_moe, LOGITS, k=1)
  assert _triples(plan) == [(0, 0, 0.5), (1, 2, 0.6), (2, 0, 0.8), (3, 1, 0.7)]
  assert np.abs(gradient(st_moe, LOGITS, k=1)).max() > 0.1


@pytest.mark.parametrize(
  "context", [RoutingContext(train=True), RoutingContext(key=jax.random.key(0))]
)
def test_random_keeps_all_where_nothing_is_random(context):
  # Catches random numbers that are drawn in evaluation, and an error without a key.
  assert _triples(run(st_moe, LOGITS, context, k=3)) == _triples(
    run(st_moe, LOGITS, k=3, policy="all")
  )


def test_others_are_kept_in_proportion_to_their_gates():
  # Choices with g = 0.7, 0.2 and 0.1 and a threshold of 0.4 are kept with probability 1, 0.5 and
  # 0.25, and the last two together with 0.125 if they are independent. The standard deviation over
  # 10000 tokens is at most 0.005. Catches a probability of g, and one r for both choices of a
  # token.
  logits = jnp.tile(jnp.log(jnp.array([0.7, 0.2, 0.1])), (10000, 1))
  plan = run(st_moe, logits, RoutingContext(key=jax.random.key(0), train=True), k=3, threshold=0.4)
  kept = np.asarray(plan.expert).reshape(3, 10000) < 3
  np.testing.assert_allclose(kept.mean(axis=1), [1.0, 0.5, 0.25], atol=0.02)
  assert abs(np.mean(kept[1] & kept[2]) - 0.125) < 0.02


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"k": 3, "threshold": 0.05, "priority": "token"},
    {"k": 3, "policy": "threshold", "priority": "gate"},
  ],
  ids=str,
)
def test_equals_the_oracle(options):
  # Catches the wrong row or column of random numbers, skipped choices that stay, unstable ties, and
  # padding that is sorted among real tokens.
  check_oracle(st_moe, oracle, *draw(1), **options)


@pytest.mark.parametrize(("tokens", "experts", "k"), [(1, 5, 2), (4, 3, 3), (4, 1, 1)])
def test_equals_the_oracle_at_the_corners(tokens, experts, k):
  # Catches errors at K = E, E = 1 and S = 1.
  check_oracle(st_moe, oracle, *draw(3, 5, tokens, experts), k=k)


@pytest.mark.parametrize("priority", ["choice", "gate"])
def test_padding_changes_nothing(priority):
  # Catches random numbers that depend on S, and padding that is served first.
  check_appended_padding(st_moe, k=3, priority=priority)


def test_router_learns():
  # Catches a stop_gradient on the gates, a gradient through skipped choices, and NaN if p
  # underflows.
  assert np.abs(gradient(st_moe, LOGITS)).max() > 0.01
  assert np.all(np.isfinite(gradient(st_moe, jnp.array([[0.0, -200.0, -300.0]]), k=3)))
  assert not np.any(gradient(st_moe, LOGITS, first=4, policy="threshold", threshold=0.9))


def test_bfloat16_logits_are_softmaxed_in_float32():
  # Catches a softmax in the model's dtype.
  plan = run(st_moe, LOGITS.astype(jnp.bfloat16))
  assert plan.gate.dtype == jnp.float32
  np.testing.assert_allclose(np.asarray(plan.gate[:4] + plan.gate[4:]), 1.0, rtol=1e-6)


@pytest.mark.parametrize(
  ("options", "field"),
  [
    ({"k": 4}, "k"),
    ({"k": 0}, "k"),
    ({"policy": "none"}, "policy"),
    ({"threshold": 0.0}, "threshold"),
    ({"priority": "gates"}, "priority"),
  ],
)
def test_bad_options_are_named(options, field):
  # Catches K > E that fails inside lax.top_k, a KeyError, and a division by zero.
  with pytest.raises(ConfigError, match=f"model.moe.router.st_moe.{field}"):
    run(st_moe, LOGITS, **options)


def test_looks_ahead():
  # Catches a changed default of the router that its declared leak ignores.
  assert ROUTER.leak() == "overflow" == ROUTER.leak(k=2, priority="choice")
  assert ROUTER.leak(k=1) == "no" == ROUTER.leak(k=2, priority="token")
  assert ROUTER.leak(k=1, priority="gate") == "yes"
