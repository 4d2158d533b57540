"""Tests forced routing, which replays plans with their own gates or with new ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from oracles import compare
from oracles.draws import softmax

from moe_jax.errors import ConfigError
from moe_jax.routing import RoutingContext, RoutingPlan
from moe_jax.routing.expert_choice import expert_choice
from moe_jax.routing.replay import replay
from moe_jax.routing.sigmoid_bias import sigmoid_bias
from moe_jax.routing.top_k import top_k

pytestmark = pytest.mark.unit

MODES = ["stored", "softmax", "softmax_kept", "sigmoid", "sigmoid_kept"]
# Token 1 has three assignments, which are not consecutive, token 0 has one, and token 2 has none.
STORED = RoutingPlan(
  token=jnp.array([1, 0, 2, 1, 1]),
  expert=jnp.array([2, 0, 3, 0, 1]),
  gate=jnp.array([0.4, 0.3, 0.0, 0.2, 0.1]),
  num_experts=3,
)
PROBS = np.array([[0.5, 0.3, 0.2], [0.3, 0.1, 0.6], [0.8, 0.15, 0.05]])
LOGITS = jnp.log(jnp.asarray(PROBS, jnp.float32))


def _replay(stored, logits, context, gate):
  return jax.jit(functools.partial(replay, gate=gate))(stored, logits, context)


def _triples(plan):
  return [(t, e, round(g, 4)) for t, e, g in reference.assignments(plan)]


@pytest.mark.parametrize(
  ("gate", "gates"),
  [
    ("stored", [0.4, 0.3, 0.2, 0.1]),
    ("softmax", [0.6, 0.5, 0.3, 0.1]),
    ("softmax_kept", [0.6, 1.0, 0.3, 0.1]),
    # The sigmoid of log p is p/(1 + p), which gives 0.6/1.6, 0.5/1.5, 0.3/1.3 and 0.1/1.1. Token
    # 1's sum is 0.6967.
    ("sigmoid", [0.375, 0.3333, 0.2308, 0.0909]),
    ("sigmoid_kept", [0.5383, 1.0, 0.3312, 0.1305]),
  ],
)
def test_by_hand(gate, gates):
  # Catches a sum over consecutive assignments instead of tokens, over all experts, or with
  # assignments to no expert, and a different order.
  plan = _replay(STORED, LOGITS, RoutingContext(), gate)
  pairs = [(1, 2), (0, 0), (1, 0), (1, 1)]
  assert _triples(plan) == [(*pair, g) for pair, g in zip(pairs, gates, strict=True)]
  assert plan.gate.dtype == jnp.float32 and plan.gate[2] == 0 and plan.expert[2] == 3


@pytest.mark.parametrize("gate", MODES)
def test_padding_names_nobody(gate):
  # Token 1 is now padding. Catches a stored plan that still routes padding.
  plan = _replay(STORED, LOGITS, RoutingContext(valid=jnp.array([True, False, True])), gate)
  assert [a[:2] for a in _triples(plan)] == [(0, 0)]
  assert plan.expert.tolist() == [3, 0, 3, 3, 3] and np.flatnonzero(plan.gate).tolist() == [1]


@pytest.mark.parametrize(
  ("router", "options", "gate"),
  [
    (top_k, {"gate_norm": "none", "priority": "gate"}, "softmax"),
    (top_k, {"gate_norm": "top_k"}, "softmax_kept"),
    (sigmoid_bias, {"k": 3, "gate_norm": "none"}, "sigmoid"),
    (sigmoid_bias, {"k": 3, "priority": "token"}, "sigmoid_kept"),
    (expert_choice, {}, "softmax"),
    (top_k, {}, "stored"),
  ],
)
def test_unchanged_logits_give_the_routers_gates(router, options, gate):
  # Catches the formula of another mode, an assumption about the order of assignments, and a changed
  # order.
  logits = jnp.asarray(compare.draw_logits(1, 1)[0])
  context = RoutingContext(valid=jnp.arange(12) % 4 > 0)
  plan = jax.jit(functools.partial(router, **options))(logits, context)
  again = _replay(plan, logits, context, gate)
  np.testing.assert_array_equal(again.token, plan.token)
  np.testing.assert_array_equal(again.expert, plan.expert)
  np.testing.assert_allclose(again.gate, plan.gate, rtol=1e-5)


def test_kept_gates_of_an_expert_choice_plan():
  # Tokens have 0, 1 or more experts. Catches a renormalisation that assumes the same number of
  # experts for all tokens.
  logits = compare.draw_logits(2, 1)[0]
  plan = expert_choice(jnp.asarray(logits), RoutingContext())
  probs, total = softmax(logits), np.zeros(12)
  for t, e, _ in reference.assignments(plan):
    total[t] += probs[t, e]
  actual = reference.assignments(
    _replay(plan, jnp.asarray(logits), RoutingContext(), "softmax_kept")
  )
  np.testing.assert_allclose(
    [g for _, _, g in actual], [probs[t, e] / total[t] for t, e, _ in actual], rtol=1e-5
  )


def test_new_logits_change_gates_but_no_choice():
  # Catches a choice that depends on the logits, and gates that do not.
  plan = jax.jit(top_k)(LOGITS, RoutingContext())
  again = _replay(plan, -LOGITS, RoutingContext(), "softmax")
  np.testing.assert_array_equal(again.expert, plan.expert)
  expected = softmax(-np.log(PROBS))[np.asarray(plan.token), np.asarray(plan.expert)]
  np.testing.assert_allclose(again.gate, expected, rtol=1e-5)


@pytest.mark.parametrize("gate", MODES)
def test_gradient(gate):
  # Token 0's only expert has a probability that underflows, and one assignment names no expert.
  # Catches a router that stops learning while its choice is frozen, NaN, and a gradient of
  # "stored".
  logits = LOGITS.at[0].set(jnp.array([-200.0, 0.0, 0.0]))

  def loss(x):
    return jnp.sum(jnp.sin(replay(STORED, x, RoutingContext(), gate=gate).gate))

  value, gradient = jax.jit(jax.value_and_grad(loss))(logits)
  assert np.isfinite(value) and np.all(np.isfinite(gradient))
  assert np.abs(gradient[1]).max() > 0.01 if gate != "stored" else not np.any(gradient)


def test_underflow():
  # Both probabilities are 0 in float32. Catches 0/0.
  plan = RoutingPlan(
    token=jnp.array([0, 0]), expert=jnp.array([0, 1]), gate=jnp.zeros(2), num_experts=3
  )
  logits = jnp.array([[-200.0, -201.0, 0.0]])
  expected = np.exp([0.0, -1.0]) / (1 + np.exp(-1.0))
  for gate in ("softmax_kept", "sigmoid_kept"):
    np.testing.assert_allclose(
      _replay(plan, logits, RoutingContext(), gate).gate, expected, rtol=1e-5
    )


def test_bad_input_is_named():
  # Catches a KeyError, and experts out of range that are treated as no expert.
  with pytest.raises(ConfigError, match="model.moe.replay_gate.*softmax_kept"):
    replay(STORED, LOGITS, RoutingContext(), gate="softmax_keep")
  with pytest.raises(ValueError, match="3 experts.* 4"):
    replay(STORED, jnp.zeros((3, 4)), RoutingContext())


def test_bfloat16_logits_give_float32_gates():
  # Catches a softmax in the model's dtype.
  plan = _replay(STORED, LOGITS.astype(jnp.bfloat16), RoutingContext(), "softmax_kept")
  assert plan.gate.dtype == jnp.float32
  np.testing.assert_allclose(float(plan.gate[0] + plan.gate[3] + plan.gate[4]), 1.0, rtol=1e-6)


def test_an_assignment_to_nobody_beside_others():
  # Token 0 keeps one of two assignments, whose gate is then 1. Catches the score of nobody in the
  # sum, or as the largest score.
  stored = RoutingPlan(jnp.array([0, 0]), jnp.array([1, 3]), jnp.array([0.5, 0.0]), 3)
  for gate in ("softmax_kept", "sigmoid_kept"):
    plan = _replay(stored, LOGITS[:1], RoutingContext(), gate)
    np.testing.assert_allclose(plan.gate, [1.0, 0.0], atol=1e-6)
