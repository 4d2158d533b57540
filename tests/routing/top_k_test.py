"""Tests top-K token choice by hand and against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from oracles.compare import check_appended_padding, check_oracle, draw

from moe_jax.errors import ConfigError
from moe_jax.routing import RoutingContext
from moe_jax.routing.top_k import ROUTER, top_k

pytestmark = pytest.mark.unit

# The softmax of the logarithms of probabilities gives the probabilities. Token 0 prefers experts 0
# and then 1, token 1 prefers experts 2 and then 0, and so on.
PROBS = np.array([[0.5, 0.3, 0.2], [0.3, 0.1, 0.6], [0.8, 0.15, 0.05], [0.1, 0.7, 0.2]])
LOGITS = jnp.log(jnp.asarray(PROBS, jnp.float32))


def _triples(plan):
  return [(t, e, round(g, 4)) for t, e, g in reference.assignments(plan)]


def test_switch_keeps_the_raw_probability():
  # Catches renormalising at K = 1 (with which all gates are 1), argmin, and a wrong axis.
  plan = top_k(LOGITS, RoutingContext(), k=1, gate_norm="none")
  assert _triples(plan) == [(0, 0, 0.5), (1, 2, 0.6), (2, 0, 0.8), (3, 1, 0.7)]


def test_renormalised_gates():
  # The first gates are 0.5/(0.5+0.3) = 0.625, 0.6/0.9 = 0.6667, 0.8/0.95 = 0.8421 and 0.7/0.9 =
  # 0.7778, and the second gates are the differences to 1. Catches a softmax over all logits, a sum
  # over the wrong axis, and token-major order as the default.
  plan = top_k(LOGITS, RoutingContext(), k=2, gate_norm="top_k")
  assert _triples(plan) == [
    (0, 0, 0.625),
    (1, 2, 0.6667),
    (2, 0, 0.8421),
    (3, 1, 0.7778),
    (0, 1, 0.375),
    (1, 0, 0.3333),
    (2, 1, 0.1579),
    (3, 2, 0.2222),
  ]


def test_order_is_priority():
  # Catches priorities that are mixed up, and "gate" that orders only the first choices, or each
  # choice by its own gate.
  def order(priority):
    return [(t, e) for t, e, _ in _triples(top_k(LOGITS, RoutingContext(), k=2, priority=priority))]

  assert order("token") == [(0, 0), (0, 1), (1, 2), (1, 0), (2, 0), (2, 1), (3, 1), (3, 2)]
  # First choices have gates of 0.5, 0.6, 0.8 and 0.7, so the order is tokens 2, 3, 1 and 0.
  assert order("gate") == [(2, 0), (3, 1), (1, 2), (0, 0), (2, 1), (3, 2), (1, 0), (0, 1)]


def test_bias_selects_but_does_not_weigh():
  # The biased scores of token 0 are 0.5, 0.3 + 0.25 and 0.2, so it takes expert 1, whose gate stays
  # 0.3. Catches a biased gate.
  plan = top_k(LOGITS, RoutingContext(bias=jnp.array([0.0, 0.25, 0.0])), k=1, gate_norm="none")
  assert _triples(plan) == [(0, 1, 0.3), (1, 2, 0.6), (2, 0, 0.8), (3, 1, 0.7)]


def test_bias_has_no_gradient():
  # Catches a balancing bias that the loss of the task trains.
  def loss(bias):
    return jnp.sum(jnp.square(top_k(LOGITS, RoutingContext(bias=bias), k=2, gate_norm="none").gate))

  assert not np.any(jax.grad(loss)(jnp.array([0.0, 0.25, 0.0])))


@pytest.mark.parametrize("priority", ["choice", "token", "gate"])
def test_padding_names_nobody(priority):
  # Catches padding that takes an expert, or that shifts the choices of other tokens.
  valid = jnp.array([True, False, True, False])
  plan = top_k(LOGITS, RoutingContext(valid=valid), k=2, priority=priority)
  expected = reference.top_k(LOGITS, 2, "top_k", priority, valid=np.asarray(valid))
  assert [(t, e) for t, e, _ in _triples(plan)] == [(t, e) for t, e, _ in expected]
  real = np.asarray(valid)[np.asarray(plan.token)]
  assert np.all(np.asarray(plan.expert)[~real] == 3) and np.all(np.asarray(plan.gate)[~real] == 0)


def test_ties_go_to_the_lower_expert():
  # Zero logits, as those of a new router or of a row of padding, are all ties. Catches an unstable
  # or reversed sort.
  plan = top_k(jnp.zeros((3, 4)), RoutingContext(), k=2)
  assert _triples(plan) == [
    (0, 0, 0.5),
    (1, 0, 0.5),
    (2, 0, 0.5),
    (0, 1, 0.5),
    (1, 1, 0.5),
    (2, 1, 0.5),
  ]


@pytest.mark.parametrize("gate_norm", ["none", "top_k"])
def test_gates_survive_underflow(gate_norm):
  # The probabilities of experts 1 and 2 underflow to 0 in float32, but they must still be chosen,
  # with finite gates. Catches 0/0 in the renormalisation if a bias selects very improbable experts.
  logits = jnp.array([[0.0, -200.0, -300.0]])
  plan = top_k(logits, RoutingContext(bias=jnp.array([-2.0, 0.0, 0.0])), k=2, gate_norm=gate_norm)
  assert np.all(np.isfinite(plan.gate)) and sorted(np.asarray(plan.expert)) == [1, 2]


def test_bfloat16_logits_are_softmaxed_in_float32():
  # Catches a softmax in the model's dtype.
  plan = top_k(LOGITS.astype(jnp.bfloat16), RoutingContext(), k=2)
  assert plan.gate.dtype == jnp.float32
  np.testing.assert_allclose(np.asarray(plan.gate[:4] + plan.gate[4:]), 1.0, rtol=1e-6)


@pytest.mark.parametrize("priority", ["choice", "token", "gate"])
@pytest.mark.parametrize("gate_norm", ["none", "top_k"])
@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_equals_the_oracle(k, gate_norm, priority):
  rng = np.random.default_rng(k)
  logits = rng.normal(size=(16, 6)).astype(np.float32)
  valid = rng.random(16) < 0.8
  bias = rng.normal(size=6).astype(np.float32) * 0.1
  plan = top_k(
    jnp.asarray(logits),
    RoutingContext(valid=jnp.asarray(valid), bias=jnp.asarray(bias)),
    k=k,
    gate_norm=gate_norm,
    priority=priority,
  )
  expected = reference.top_k(logits, k, gate_norm, priority, valid, bias)
  actual = reference.assignments(plan)
  assert [a[:2] for a in actual] == [a[:2] for a in expected]
  np.testing.assert_allclose([a[2] for a in actual], [a[2] for a in expected], rtol=1e-5)


def _oracle(logits, context, **options):
  bias = None if context.bias is None else np.asarray(context.bias)
  return reference.top_k(
    logits,
    options["k"],
    options.get("gate_norm", "top_k"),
    options.get("priority", "choice"),
    np.asarray(context.valid),
    bias,
  )


@pytest.mark.parametrize(
  "options",
  [
    {"k": 1, "gate_norm": "none"},
    {"k": 2},
    {"k": 3, "priority": "gate"},
    {"k": 5, "priority": "token"},
  ],
  ids=str,
)
def test_equals_the_oracle_on_50_draws(options):
  # Half of the groups have tied experts and tied tokens. Catches faults that a single draw hides.
  check_oracle(top_k, _oracle, *draw(1), **options)


@pytest.mark.parametrize(("tokens", "experts", "k"), [(1, 5, 2), (4, 1, 1), (4, 3, 3)])
def test_equals_the_oracle_at_the_corners(tokens, experts, k):
  # The corners are S = 1, E = 1 and K = E. Catches a division by E - 1, and K clipped to E - 1.
  check_oracle(top_k, _oracle, *draw(3, 5, tokens, experts), k=k)


def test_appended_padding_changes_nothing():
  # Catches padding that comes before real tokens with priority "gate".
  check_appended_padding(top_k, k=2, priority="gate")


@pytest.mark.parametrize(("gate_norm", "trains"), [("none", True), ("top_k", False)])
def test_router_gradient_at_one_expert_a_token(gate_norm, trains):
  # Catches renormalisation in Switch, which makes the gate the constant 1, and a change of "top_k"
  # that gives it a gradient.
  gradient = jax.grad(
    lambda l: jnp.sum(jnp.sin(top_k(l, RoutingContext(), k=1, gate_norm=gate_norm).gate))
  )(LOGITS)
  assert (np.abs(gradient).max() > 0.1) if trains else not np.any(gradient)


@pytest.mark.parametrize(
  ("options", "field"),
  [
    ({"k": 4}, "k"),
    ({"k": 0}, "k"),
    ({"gate_norm": "topk"}, "gate_norm"),
    ({"priority": "random"}, "priority"),
  ],
)
def test_bad_options_are_named(options, field):
  # Catches K > E that fails inside lax.top_k, and a KeyError.
  with pytest.raises(ConfigError, match=field):
    top_k(LOGITS, RoutingContext(), **options)


def test_looks_ahead():
  # Catches first choices that are declared safe with batch priority, and Switch that is declared to
  # leak.
  said = [
    ROUTER.leak(**o) for o in ({}, {"k": 1}, {"priority": "token"}, {"k": 1, "priority": "gate"})
  ]
  assert said == ["overflow", "no", "no", "yes"]
