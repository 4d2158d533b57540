"""Tests capped expert choice by hand, and against its linear programme and the oracle."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import scipy.optimize
from oracles.capped_expert_choice import capped_expert_choice as oracle
from oracles.compare import GROUPS, check_appended_padding, check_oracle, draw, gradient, run

from moe_jax.errors import ConfigError
from moe_jax.routing import RoutingContext
from moe_jax.routing.capped_expert_choice import ROUTER, _project, _row_sum, capped_expert_choice
from moe_jax.routing.expert_choice import expert_choice

pytestmark = pytest.mark.numerics

PROBS = np.array([[0.5, 0.4, 0.1], [0.4, 0.1, 0.5], [0.1, 0.3, 0.6], [0.35, 0.25, 0.4]])
LOGITS = jnp.log(jnp.asarray(PROBS, jnp.float32))
# With these options S / lambda is at most 20, so that float32 and float64 agree on every choice.
SHARP = {"entropy": 0.05, "iterations": 20}

_log_a = jax.jit(_project, static_argnums=(2, 3))


def _triples(plan):
  return [(t, e, round(g, 4)) for t, e, g in reference.assignments(plan)]


def test_by_hand():
  # There is one slot per expert (C = round(0.75 * 4 / 3)) and one expert per token. Experts 0 and 1
  # both prefer token 0. Expert 1 gets it, because expert 0 loses less: 0.4 (token 1) + 0.4 + 0.6 =
  # 1.4, whereas 0.5 + 0.3 + 0.5 = 1.3 and 0.5 + 0.25 + 0.6 = 1.35. Catches a greedy cap, which
  # leaves token 0 with expert 0 and its score of 0.5.
  plan = run(capped_expert_choice, LOGITS, capacity_factor=0.75, max_experts=1, entropy=0.01)
  assert _triples(plan) == [(1, 0, 0.4), (0, 1, 0.4), (2, 2, 0.6)]


def test_a_token_in_too_many_lists_keeps_the_best():
  # All tokens are equal, so both experts propose to tokens 0 and 1, with equal A. These tokens
  # accept expert 0, and expert 1 then proposes to tokens 2 and 3. Catches a cap that relies on A, a
  # slot that stays empty, and a tie that the higher index wins.
  plan = run(capped_expert_choice, jnp.zeros((4, 2)), capacity_factor=1.0, max_experts=1)
  assert _triples(plan) == [(0, 0, 0.5), (1, 0, 0.5), (2, 1, 0.5), (3, 1, 0.5)]


def test_what_cannot_be_filled_names_nobody():
  # Two of four tokens are real and have one place each, so two of the 2 * 2 slots stay empty.
  # Catches a nonzero gate of an empty slot.
  context = RoutingContext(valid=jnp.array([True, True, False, False]))
  plan = run(capped_expert_choice, jnp.zeros((4, 2)), context, capacity_factor=1.0, max_experts=1)
  assert plan.expert.tolist() == [0, 0, 2, 2] and plan.gate.tolist() == [0.5, 0.5, 0.0, 0.0]


def test_nearly_all_slots_are_filled_with_the_papers_values():
  # After 100 sweeps with lambda = 0.001 and b = c = 2, A is far from integral. With one round of
  # proposals, one slot in seven stays empty (1024 tokens, 8 experts). Catches experts that propose
  # only once.
  logits = jax.random.normal(jax.random.key(0), (256, 8)) + 0.3 * jax.random.normal(
    jax.random.key(1), (1, 8)
  )
  assert np.mean(np.asarray(run(capped_expert_choice, logits).expert) == 8) < 0.02


@pytest.mark.parametrize("max_experts", [2, 3])
def test_the_constraints_hold(max_experts):
  # There are 12 tokens, 5 experts with C = 4 slots, and 24 or 36 places. Catches a projection on
  # the wrong axis and a bound other than b. A missing correction would not change the sums; the
  # test of the linear programme catches it.
  for scores in jax.nn.softmax(draw(1, 5)[0], axis=-1):
    a = np.exp(np.minimum(_log_a(scores.T / 0.05, jnp.float32(4.0), max_experts, 3000), 0.0))
    np.testing.assert_allclose(a.sum(axis=1), 4.0, rtol=1e-3)
    assert np.all(a.sum(axis=0) <= max_experts * 1.001)
    assert np.all((a >= 0) & (a <= 1))


@pytest.mark.parametrize(("factor", "max_experts"), [(2.0, 2), (1.0, 1), (1.5, 3)])
def test_reaches_the_linear_programme(factor, max_experts):
  # The optimum without entropy under the same constraints is integral if there are no ties, and the
  # choice equals that optimum. There are 10 tokens and 5 experts, and in the first two cases every
  # token gets as many experts as the cap allows. Catches projections without corrections, a missing
  # constraint, the wrong sign of an update, and a cap that drops more than necessary.
  drawn = 2.0 * np.random.default_rng(5).normal(size=(20, 10, 5)).astype(np.float32)
  plan = jax.jit(
    jax.vmap(
      functools.partial(
        capped_expert_choice,
        capacity_factor=factor,
        max_experts=max_experts,
        entropy=0.01,
        iterations=300,
      ),
      in_axes=(0, None),
    )
  )
  gates = np.asarray(plan(jnp.asarray(drawn), RoutingContext()).gate, np.float64)
  optimum = [
    _optimum(np.asarray(jax.nn.softmax(l), np.float64).T, round(factor * 10 / 5), max_experts)
    for l in drawn
  ]
  np.testing.assert_allclose(gates.sum(axis=1), optimum, rtol=1e-5)


def _optimum(scores, capacity, max_experts):
  num_experts, num_tokens = scores.shape
  rows = np.kron(np.eye(num_experts), np.ones(num_tokens))
  columns = np.kron(np.ones(num_experts), np.eye(num_tokens))
  found = scipy.optimize.linprog(
    -scores.ravel(),
    columns,
    np.full(num_tokens, max_experts),
    rows,
    np.full(num_experts, capacity),
    bounds=(0, 1),
  )
  return -found.fun


@pytest.mark.parametrize("max_experts", [1, 2])
def test_no_token_gets_more_than_its_cap(max_experts):
  # With the paper's lambda and few sweeps A is far from integral. Catches a cap that relies on A.
  router = functools.partial(
    capped_expert_choice, capacity_factor=1.0, max_experts=max_experts, iterations=5
  )
  plans = jax.device_get(jax.jit(jax.vmap(router, in_axes=(0, None)))(draw(3)[0], RoutingContext()))
  for g in range(GROUPS):
    served = reference.assignments(jax.tree.map(lambda leaf, g=g: leaf[g], plans))
    assert max(collections.Counter(t for t, _, _ in served).values()) <= max_experts
    assert max(collections.Counter(e for _, e, _ in served).values()) <= 2


def test_a_cap_of_all_experts_is_expert_choice():
  # Catches a cap that has an effect, choices that differ from TopK(S^T), and a different order or
  # gate.
  for logits in draw(4, 10)[0]:
    plan = run(capped_expert_choice, logits, max_experts=5, **SHARP)
    jax.tree.map(np.testing.assert_array_equal, plan, run(expert_choice, logits))


@pytest.mark.parametrize(
  "options",
  [
    {"max_experts": 2},
    {"max_experts": 3},
    {"capacity_factor": 1.0, "max_experts": 1},
    {"max_experts": 5},
  ],
  ids=str,
)
def test_equals_the_oracle(options):
  # Catches a correction that is kept too long or missing, constraints in a different order, and
  # padding that counts in a row or in the sum of a row.
  check_oracle(capped_expert_choice, oracle, *draw(1), **options, **SHARP)


@pytest.mark.parametrize(("tokens", "experts"), [(1, 5), (4, 1), (4, 3)])
def test_equals_the_oracle_at_the_corners(tokens, experts):
  # For (1, 5) and (4, 3), C is rounded up to more slots than there are places. Catches errors in
  # this case, at C = 0 and at b > E.
  check_oracle(capped_expert_choice, oracle, *draw(3, 5, tokens, experts), **SHARP)


def test_appended_padding_changes_nothing():
  # C = 1.5 * 12/8 = 2 both without padding and with 5 rows of padding. Catches padding with A > 0,
  # and places that are counted for padding.
  options = {"max_experts": 2, **SHARP}
  check_appended_padding(
    capped_expert_choice,
    longer={"capacity_factor": 1.5 * 12 / 17, **options},
    capacity_factor=1.5,
    **options,
  )


def test_router_learns_by_the_gates_only():
  # The gradient equals that of the softmax with a fixed choice. Catches a stop_gradient on the
  # gates, a gradient through the projections, and NaN.
  plan = run(capped_expert_choice, LOGITS)

  def held(l):
    return jnp.sum(
      jnp.sin(jnp.where(plan.expert < 3, jax.nn.softmax(l)[plan.token, plan.expert], 0.0))
    )

  learned = gradient(capped_expert_choice, LOGITS)
  np.testing.assert_allclose(learned, jax.jit(jax.grad(held))(LOGITS), rtol=1e-5, atol=1e-7)
  assert np.abs(learned).max() > 0.01


def test_finite_at_the_papers_lambda():
  # S / lambda = 1000 overflows exp. The cases are very confident tokens, and no real token at all.
  # Catches projections that do not use logarithms, and log 0 - log 0.
  for valid in ([True] * 4, [False] * 4):
    logits = jnp.array([[500.0, 0.0], [500.0, 0.0], [0.0, 0.0], [0.0, 500.0]])
    scores = jax.nn.softmax(logits).T
    assert np.all(
      np.isfinite(
        _log_a(jnp.where(jnp.array(valid), scores / 0.001, -1e30), jnp.float32(2.0), 2, 100)
      )
    )
    plan = run(
      capped_expert_choice, logits, RoutingContext(valid=jnp.array(valid)), capacity_factor=1.0
    )
    assert np.all(np.isfinite(plan.gate)) and len(reference.assignments(plan)) == (
      4 if all(valid) else 0
    )


def test_bfloat16_logits_are_softmaxed_in_float32():
  # Catches a softmax in the model's dtype.
  rounded = LOGITS.astype(jnp.bfloat16)
  plan = run(capped_expert_choice, rounded)
  assert plan.gate.dtype == jnp.float32
  np.testing.assert_array_equal(
    plan.gate, run(capped_expert_choice, rounded.astype(jnp.float32)).gate
  )


@pytest.mark.parametrize(
  ("options", "field"),
  [
    ({"capacity_factor": 0.0}, "capacity_factor"),
    ({"max_experts": 0}, "max_experts"),
    ({"entropy": 0.0}, "entropy"),
    ({"iterations": 0}, "iterations"),
    ({"max_experts": 1}, "max_experts=1: must be at least capacity_factor=2.0"),
  ],
)
def test_bad_options_are_named(options, field):
  # Catches a cap below the mean number of experts per token, which no choice can satisfy, and a
  # division by zero.
  with pytest.raises(ConfigError, match=f"model.moe.router.capped_expert_choice.{field}"):
    run(capped_expert_choice, LOGITS, **options)


def test_a_large_factor_needs_no_larger_cap_than_experts():
  # C is clipped to S, so 3 places per token are enough for any factor. Catches b < c that is
  # refused although it is feasible.
  plan = run(capped_expert_choice, LOGITS, capacity_factor=9.0, max_experts=3)
  assert len(reference.assignments(plan)) == 12


def test_looks_ahead():
  # Catches a declared leak with which a causal model could use the router.
  assert ROUTER.leak() == "yes" == ROUTER.leak(max_experts=1)


def test_the_sum_of_a_row_with_few_tokens():
  # One real token has two places among four experts, half a place for each; without any real token
  # the sum is that of one. Catches experts that must take more than there is.
  for valid in ([True, False, False], [False] * 3):
    assert float(_row_sum(jnp.asarray(valid), 4, 8, 2)) == 0.5
  # An expert gets a token at most once, however many experts a token may have.
  assert float(_row_sum(jnp.ones(3, bool), 2, 8, 4)) == 3.0
