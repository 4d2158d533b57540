"""Tests GShard's top-2 by hand, against Algorithm 1 with its counters and against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from oracles.compare import check_appended_padding, check_oracle, draw, gradient, run
from oracles.gshard import algorithm_1, mesh_tensorflow
from oracles.gshard import gshard as oracle

from moe_jax.errors import ConfigError
from moe_jax.routing import RoutingContext
from moe_jax.routing.gshard import ROUTER, gshard

pytestmark = pytest.mark.numerics

PROBS = np.array([[0.5, 0.3, 0.2], [0.3, 0.1, 0.6], [0.8, 0.15, 0.05], [0.1, 0.7, 0.2]])
LOGITS = jnp.log(jnp.asarray(PROBS, jnp.float32))
# g1 is 0.5/0.8, 0.6/0.9, 0.8/0.95 and 0.7/0.9, and g2 = 1 - g1 is 0.375, 0.3333, 0.1579 and 0.2222.
FIRST = [(0, 0, 0.625), (1, 2, 0.6667), (2, 0, 0.8421), (3, 1, 0.7778)]


def _triples(plan):
  return [(t, e, round(g, 4)) for t, e, g in reference.assignments(plan)]


def test_threshold_by_hand():
  # Tokens 0 and 1 have g2 > 0.31. A skipped choice keeps its slot or names no expert. Catches a
  # skipped choice with a gate, g1 renormalised to 1 if the second choice is skipped, p2 instead of
  # g2 (0.3 is not above 0.31), and the two values of skipped_keeps_slot mixed up.
  options = {"second_policy": "threshold", "threshold": 0.31}
  second = [(0, 1, 0.375), (1, 0, 0.3333), (2, 1, 0.0), (3, 2, 0.0)]
  assert _triples(run(gshard, LOGITS, **options)) == FIRST + second
  assert _triples(run(gshard, LOGITS, skipped_keeps_slot=False, **options)) == FIRST + second[:2]


def test_all_and_none_by_hand():
  # Catches "none" that drops first choices, and "all" that is random.
  context = RoutingContext(key=jax.random.key(0), train=True)
  second = [(0, 1, 0.375), (1, 0, 0.3333), (2, 1, 0.1579), (3, 2, 0.2222)]
  assert _triples(run(gshard, LOGITS, context, second_policy="all")) == FIRST + second
  assert (
    _triples(run(gshard, LOGITS, context, second_policy="none", skipped_keeps_slot=False)) == FIRST
  )


@pytest.mark.parametrize(
  "context", [RoutingContext(train=True), RoutingContext(key=jax.random.key(0))]
)
def test_random_keeps_all_where_nothing_is_random(context):
  # Catches random numbers that are drawn in evaluation, and an error without a key.
  assert _triples(run(gshard, LOGITS, context)) == _triples(
    run(gshard, LOGITS, second_policy="all")
  )


@pytest.mark.parametrize(
  ("threshold", "expected"), [(0.5, (0.2, 0.5, 0.8)), (0.2, (0.5, 1.0, 1.0))]
)
def test_the_second_is_kept_in_proportion_to_its_gate(threshold, expected):
  # Choices with g2 = 0.1, 0.25 and 0.4 are kept with probability min(1, g2 / threshold), which is
  # 2 g2 at a threshold of 0.5. The standard deviation of a frequency over 10000 tokens is at most
  # 0.005. Catches g2 > r without the factor 2, r < g1, and one r for all tokens.
  for g2, probability in zip((0.1, 0.25, 0.4), expected, strict=True):
    logits = jnp.tile(jnp.log(jnp.array([g2, 1 - g2])), (10000, 1))
    plan = run(
      gshard, logits, RoutingContext(key=jax.random.key(1), train=True), threshold=threshold
    )
    kept = np.asarray(plan.gate[10000:]) > 0
    assert abs(kept.mean() - probability) < 0.02


@pytest.mark.parametrize("capacity", [1, 3, 5])
def test_is_algorithm_1_and_mesh_tensorflow(capacity):
  # The paper's counters include tokens that do not fit, and Mesh-TensorFlow's do not. A dispatcher
  # with this capacity must serve the pairs that each of them dispatches. Catches a skipped choice
  # that gives up its slot in the former or keeps it in the latter, and second choices that are
  # served among the first choices.
  many, contexts = draw(capacity, 10)
  for logits, key in zip(many, contexts.key, strict=True):
    context = RoutingContext(key=key, train=True)
    assert _served(logits, context, capacity) == sorted(algorithm_1(logits, context, capacity))
    mesh = mesh_tensorflow(logits, context, capacity, 0.2)
    assert _served(logits, context, capacity, threshold=0.2, skipped_keeps_slot=False) == sorted(
      mesh
    )


def _served(logits, context, capacity, **options):
  plan = reference.assignments(run(gshard, logits, context, **options))
  return sorted(
    a[:2] for a in reference.drop_overflow(plan, logits.shape[-1], capacity) if a[2] > 0
  )


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"threshold": 0.2, "skipped_keeps_slot": False},
    {"second_policy": "threshold", "threshold": 0.25},
    {"second_policy": "none", "skipped_keeps_slot": False},
  ],
  ids=str,
)
def test_equals_the_oracle(options):
  # Catches a wrong column of choices, random numbers that depend on padding, and unstable ties.
  check_oracle(gshard, oracle, *draw(1), **options)


@pytest.mark.parametrize(("tokens", "experts"), [(1, 5), (4, 2)])
def test_equals_the_oracle_at_the_corners(tokens, experts):
  # Catches errors at K = E and S = 1.
  check_oracle(gshard, oracle, *draw(3, 5, tokens, experts))


def test_padding_changes_nothing():
  # Catches random numbers r that depend on S.
  check_appended_padding(gshard)


def test_router_learns_from_both_choices_but_not_from_skipped_ones():
  # d sin(g2) / d logits is cos(g2) * g1 * g2 * (-1, 1), which is 0.2181 * (-1, 1) for token 0.
  # Catches a stop_gradient on the gates, and a gradient through the gate of a skipped choice.
  np.testing.assert_allclose(
    gradient(gshard, LOGITS, first=4)[0], [-0.2181, 0.2181, 0.0], atol=1e-4
  )
  assert not np.any(gradient(gshard, LOGITS, first=4, second_policy="none"))
  both = gradient(gshard, LOGITS)
  assert np.all(np.isfinite(both)) and np.abs(both).max() > 0.01


def test_gates_survive_underflow_and_bfloat16():
  # p2 and p3 underflow to 0 in float32. Catches a division by p2 + p3, and a softmax in the model's
  # dtype.
  plan = run(gshard, jnp.array([[0.0, -200.0, -300.0]]))
  assert _triples(plan) == [(0, 0, 1.0), (0, 1, 0.0)]
  plan = run(gshard, LOGITS.astype(jnp.bfloat16))
  assert plan.gate.dtype == jnp.float32
  np.testing.assert_allclose(np.asarray(plan.gate[:4] + plan.gate[4:]), 1.0, rtol=1e-6)


@pytest.mark.parametrize(
  ("options", "field"),
  [({"second_policy": "randm"}, "second_policy.*'random'"), ({"threshold": 0.0}, "threshold")],
)
def test_bad_options_are_named(options, field):
  # Catches a KeyError, and a division by zero.
  with pytest.raises(ConfigError, match=f"model.moe.router.gshard.{field}"):
    run(gshard, LOGITS, **options)


def test_one_expert_is_refused():
  # Catches a top-2 of one expert that fails inside lax.top_k.
  with pytest.raises(ConfigError, match=r"model\.moe\.num_experts=1.* 2 experts"):
    run(gshard, LOGITS[:, :1])


def test_looks_ahead():
  # Catches a declared leak that ignores second choices.
  assert (
    ROUTER.leak()
    == "overflow"
    == ROUTER.leak(second_policy="random", threshold=0.5, skipped_keeps_slot=True)
  )
  assert ROUTER.leak(second_policy="none") == "no"
