"""No token left behind, by hand and against the oracle."""

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

# Tokens 0, 1, 2 and 4 want expert 0. With 2 slots an expert, 2 and 4 overflow: 2 asks expert 1, 4
# asks expert 1 too.
PROBS = np.array(
  [[0.5, 0.3, 0.2], [0.6, 0.1, 0.3], [0.8, 0.15, 0.05], [0.1, 0.7, 0.2], [0.4, 0.35, 0.25]]
)
LOGITS = jnp.log(jnp.asarray(PROBS, jnp.float32))


def _triples(plan):
  return [(t, e, round(g, 4)) for t, e, g in reference.assignments(plan)]


def test_by_hand():
  # C = round(1.2 * 5 / 3) = 2. Round 1: 0, 1 at expert 0, 3 at expert 1. Round 2: 2 takes expert
  # 1's last slot, 4 finds none. Round 3: 4 goes to expert 2. Catches: renormalised gates, the first
  # choice's gate, token 2 before 3.
  first, second, third = [(0, 0, 0.5), (1, 0, 0.6), (3, 1, 0.7)], [(2, 1, 0.15)], [(4, 2, 0.25)]

  def plan(choices):
    return _triples(run(no_token_left_behind, LOGITS, choices=choices, capacity_factor=1.2))

  assert plan(1) == first
  assert plan(2) == first + second
  assert plan(3) == first + second + third == plan(4)


def test_first_choices_go_before_rerouted_tokens():
  # One slot an expert: token 1 overflows, but its second choice is token 2's first. Catches: one
  # pass by position.
  logits = jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1]]))
  plan = run(no_token_left_behind, logits, capacity_factor=1.0)
  assert _triples(plan) == [(0, 0, 0.7), (2, 1, 0.8), (1, 2, 0.1)]


def test_padding_asks_nobody():
  # Without token 0 and 3: 1 and 2 fill expert 0, 4 finds a free expert 1. Catches: padding that
  # takes a slot.
  valid = jnp.array([False, True, True, False, True])
  plan = run(no_token_left_behind, LOGITS, RoutingContext(valid=valid), capacity_factor=1.2)
  assert _triples(plan) == [(1, 0, 0.6), (2, 0, 0.8), (4, 1, 0.35)]
  assert plan.token.shape == (5,) and not np.any(
    np.asarray(plan.gate)[np.asarray(plan.expert) == 3]
  )


@pytest.mark.parametrize("factor", [0.4, 1.25])
def test_no_expert_overflows_and_nobody_is_left_behind(factor):
  # 12 tokens, most of which want the first of 5 experts: C = 1, 3. Catches: slots given twice; a
  # token left although slots are free and it asks all experts.
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
  # Catches: an order that differs from Switch's, a gate that does.
  logits = draw(6, 1)[0][0]
  plan = run(no_token_left_behind, logits, capacity_factor=5.0)  # C = S
  switch = run(top_k, logits, k=1, gate_norm="none")
  jax.tree.map(np.testing.assert_array_equal, plan, switch)


def test_first_round_is_switch_with_capacity():
  # Catches: rerouted tokens that take a slot from Switch's.
  for logits in draw(7, 10)[0]:
    plan = reference.assignments(run(no_token_left_behind, logits, capacity_factor=1.0))
    switch = reference.drop_overflow(reference.top_k(logits, 1, "none"), EXPERTS, 2)
    assert [a[:2] for a in plan[: len(switch)]] == [a[:2] for a in switch]


def test_later_tokens_move_only_what_overflowed():
  # Other logits for the last 6 tokens leave the first 6 tokens' first choices where they were, and
  # in some group move one that had overflowed. Catches: looks_ahead that should be "yes", or "no".
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
  # Catches: loads that forget a round, ranks that count served tokens, unstable ties.
  logits, context = draw(1)
  logits[..., :2] += 2.0  # so that experts overflow
  check_oracle(no_token_left_behind, oracle, logits, context, **options)


@pytest.mark.parametrize(("tokens", "experts"), [(1, 5), (4, 1)])
def test_equals_the_oracle_at_the_corners(tokens, experts):
  # Catches: C = 0, more choices than experts.
  check_oracle(no_token_left_behind, oracle, *draw(3, 5, tokens, experts))


def test_appended_padding_changes_nothing():
  # C = 12/5 = 2 without, and 17/5 * 12/17 = 2 with 5 padded rows. Catches: padding that takes
  # slots.
  check_appended_padding(
    no_token_left_behind, longer={"capacity_factor": 12 / 17}, capacity_factor=1.0
  )


def test_router_learns():
  # Catches: a stop_gradient on the gates.
  learned = gradient(no_token_left_behind, LOGITS)
  assert np.all(np.isfinite(learned)) and np.abs(learned).max() > 0.01


def test_bfloat16_logits_are_softmaxed_in_float32():
  # Catches: a softmax in the model's dtype.
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
  # Catches: a failure inside lax.top_k, experts without slots.
  with pytest.raises(ConfigError, match=f"model.moe.router.no_token_left_behind.{field}"):
    run(no_token_left_behind, LOGITS, **options)


def test_looks_ahead():
  # Catches: a changed default of the router that its causality statement misses.
  assert ROUTER.leak() == "overflow" == ROUTER.leak(choices=4, capacity_factor=1.25)
  assert ROUTER.leak(choices=1) == "no"
