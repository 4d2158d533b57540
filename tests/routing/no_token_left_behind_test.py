"""Tests No-Token-Left-Behind by hand and against the oracle."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from oracles.compare import (
  EXPERTS,
  GROUPS,
  check_appended_padding,
  check_oracle,
  draw,
  gradient,
  run,
)
from oracles.no_token_left_behind import no_token_left_behind as oracle

from moe_jax.errors import ConfigError
from moe_jax.routing import RoutingContext
from moe_jax.routing.no_token_left_behind import ROUTER, no_token_left_behind
from moe_jax.routing.top_k import top_k

pytestmark = pytest.mark.numerics

# Tokens 0, 1, 2 and 4 prefer expert 0. With 2 slots per expert, tokens 2 and 4 overflow, and both
# ask expert 1 next.
PROBS = np.array(
  [[0.5, 0.3, 0.2], [0.6, 0.1, 0.3], [0.8, 0.15, 0.05], [0.1, 0.7, 0.2], [0.4, 0.35, 0.25]]
)
LOGITS = jnp.log(jnp.asarray(PROBS, jnp.float32))


def _triples(plan):
  return [(t, e, round(g, 4)) for t, e, g in reference.assignments(plan)]


def test_by_hand():
  # C = round(1.2 * 5 / 3) = 2. In round 1, expert 0 serves tokens 0 and 1, and expert 1 serves
  # token 3. In round 2, token 2 takes the last slot of expert 1, and token 4 finds none. In round
  # 3, token 4 goes to expert 2. Catches renormalised gates, the gate of the first choice, and token
  # 2 before token 3.
  first, second, third = [(0, 0, 0.5), (1, 0, 0.6), (3, 1, 0.7)], [(2, 1, 0.15)], [(4, 2, 0.25)]

  def plan(choices):
    return _triples(run(no_token_left_behind, LOGITS, choices=choices, capacity_factor=1.2))

  assert plan(1) == first
  assert plan(2) == first + second
  assert plan(3) == first + second + third == plan(4)


def test_first_choices_go_before_rerouted_tokens():
  # There is one slot per expert. Token 1 overflows, but its second choice is token 2's first
  # choice. Catches a single pass in order of position.
  logits = jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1]]))
  plan = run(no_token_left_behind, logits, capacity_factor=1.0)
  assert _triples(plan) == [(0, 0, 0.7), (2, 1, 0.8), (1, 2, 0.1)]


def test_padding_asks_nobody():
  # Tokens 0 and 3 are padding. Tokens 1 and 2 fill expert 0, and token 4 finds a free slot at
  # expert 1. Catches padding that takes a slot.
  valid = jnp.array([False, True, True, False, True])
  plan = run(no_token_left_behind, LOGITS, RoutingContext(valid=valid), capacity_factor=1.2)
  assert _triples(plan) == [(1, 0, 0.6), (2, 0, 0.8), (4, 1, 0.35)]
  assert plan.token.shape == (5,) and not np.any(
    np.asarray(plan.gate)[np.asarray(plan.expert) == 3]
  )


@pytest.mark.parametrize("factor", [0.4, 1.25])
def test_no_expert_overflows_and_nobody_is_left_behind(factor):
  # Most of 12 tokens prefer the first of 5 experts, and C is 1 or 3. Catches a slot that is given
  # twice, and a token without an expert although slots are free and it asks all experts.
  capacity = round(factor * 12 / 5)
  logits = draw(5)[0]
  logits[..., 0] += 3.0
  router = functools.partial(no_token_left_behind, choices=5, capacity_factor=factor)
  plans = jax.device_get(
    jax.jit(jax.vmap(router, in_axes=(0, None)))(jnp.asarray(logits), RoutingContext())
  )
  for g in range(GROUPS):
    served = reference.assignments(jax.tree.map(lambda leaf, g=g: leaf[g], plans))
    assert max(collections.Counter(e for _, e, _ in served).values()) <= capacity
    assert len({t for t, _, _ in served}) == len(served) == min(12, 5 * capacity)


def test_is_switch_where_nothing_overflows():
  # Catches an order or a gate that differs from Switch's.
  logits = draw(6, 1)[0][0]
  plan = run(no_token_left_behind, logits, capacity_factor=5.0)  # C = S
  switch = run(top_k, logits, k=1, gate_norm="none")
  jax.tree.map(np.testing.assert_array_equal, plan, switch)


def test_first_round_is_switch_with_capacity():
  # Catches rerouted tokens that take a slot from the tokens that Switch serves.
  for logits in draw(7, 10)[0]:
    plan = reference.assignments(run(no_token_left_behind, logits, capacity_factor=1.0))
    switch = reference.drop_overflow(reference.top_k(logits, 1, "none"), EXPERTS, 2)
    assert [a[:2] for a in plan[: len(switch)]] == [a[:2] for a in switch]


def test_later_tokens_move_only_what_overflowed():
  # Different logits of the last 6 tokens do not move tokens among the first 6 that have their first
  # choice, but in some group they move a token that overflowed. Catches a `looks_ahead` that should
  # be "yes" or "no".
  plan = jax.jit(jax.vmap(lambda l: no_token_left_behind(l, RoutingContext(), capacity_factor=1.0)))
  drawn = draw(8)[0]
  other = drawn.copy()
  other[:, 6:] = draw(9)[0][:, 6:]

  def experts(plan):
    return np.take_along_axis(np.asarray(plan.expert), np.argsort(plan.token, axis=1), axis=1)[
      :, :6
    ]

  before, after = experts(plan(jnp.asarray(drawn))), experts(plan(jnp.asarray(other)))
  has_its_first = before == np.argmax(drawn[:, :6], axis=-1)
  assert np.array_equal(before[has_its_first], after[has_its_first])
  assert np.any(before != after)


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"choices": 2, "capacity_factor": 0.8},
    {"choices": 1},
    {"choices": 9, "capacity_factor": 1.0},
  ],
  ids=str,
)
def test_equals_the_oracle(options):
  # Catches loads that omit a round, ranks that count served tokens, and unstable ties.
  logits, context = draw(1)
  logits[..., :2] += 2.0  # This makes experts overflow.
  check_oracle(no_token_left_behind, oracle, logits, context, **options)


@pytest.mark.parametrize(("tokens", "experts"), [(1, 5), (4, 1)])
def test_equals_the_oracle_at_the_corners(tokens, experts):
  # Catches errors at C = 0 and with more choices than experts.
  check_oracle(no_token_left_behind, oracle, *draw(3, 5, tokens, experts))


def test_appended_padding_changes_nothing():
  # The factors give the same C without padding and with 5 rows of padding. Catches padding that
  # takes slots.
  check_appended_padding(
    no_token_left_behind, longer={"capacity_factor": 12 / 17}, capacity_factor=1.0
  )


def test_router_learns():
  # Catches a stop_gradient on the gates.
  learned = gradient(no_token_left_behind, LOGITS)
  assert np.all(np.isfinite(learned)) and np.abs(learned).max() > 0.01


def test_bfloat16_logits_are_softmaxed_in_float32():
  # Catches a softmax in the model's dtype.
  rounded = LOGITS.astype(jnp.bfloat16)
  plan = run(no_token_left_behind, rounded)
  assert plan.gate.dtype == jnp.float32
  np.testing.assert_array_equal(
    plan.gate, run(no_token_left_behind, rounded.astype(jnp.float32)).gate
  )


@pytest.mark.parametrize(
  ("options", "field"), [({"choices": 0}, "choices"), ({"capacity_factor": 0.0}, "capacity_factor")]
)
def test_bad_options_are_named(options, field):
  # Catches an error inside lax.top_k, and experts without slots.
  with pytest.raises(ConfigError, match=f"model.moe.router.no_token_left_behind.{field}"):
    run(no_token_left_behind, LOGITS, **options)


def test_looks_ahead():
  # Catches a changed default of the router that its declared leak ignores.
  assert ROUTER.leak() == "overflow" == ROUTER.leak(choices=4, capacity_factor=1.25)
  assert ROUTER.leak(choices=1) == "no"
