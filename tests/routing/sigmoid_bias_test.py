"""Tests DeepSeek-V3's sigmoid gate with a selection bias by hand and against the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from oracles import compare
from oracles.sigmoid_bias import sigmoid_bias as oracle

from moe_jax.errors import ConfigError
from moe_jax.routing import RoutingContext
from moe_jax.routing.sigmoid_bias import ROUTER, sigmoid_bias

pytestmark = pytest.mark.numerics

S = np.array(
  [
    [0.9, 0.6, 0.3],  # Sigmoids need not sum to 1.
    [0.2, 0.1, 0.6],
    [0.5, 0.7, 0.4],
    [0.1, 0.3, 0.2],
  ]
)
LOGITS = jnp.asarray(np.log(S / (1 - S)), jnp.float32)


def _triples(logits, bias=None, **options):
  route = jax.jit(functools.partial(sigmoid_bias, **options))
  plan = route(logits, RoutingContext(bias=None if bias is None else jnp.asarray(bias)))
  return [(t, e, round(g, 4)) for t, e, g in reference.assignments(plan)]


def _draw_logits(seed):
  """Returns logits that are shifted, so that no two are x and -x.

  Because sigmoid(x) + sigmoid(-x) = 1, such logits would cause ties between groups, which rounding
  would decide.
  """
  return compare.draw_logits(seed) + np.float32(1 / 256)


def test_by_hand():
  # The first gates are 0.9/(0.9+0.6) = 0.6, 0.6/0.8 = 0.75, 0.7/1.2 = 0.5833 and 0.3/0.5 = 0.6, and
  # the second gates are the differences to 1. Catches a softmax instead of a sigmoid, and gates
  # that sum to more than 1.
  assert _triples(LOGITS, k=2) == [
    (0, 0, 0.6),
    (1, 2, 0.75),
    (2, 1, 0.5833),
    (3, 1, 0.6),
    (0, 1, 0.4),
    (1, 0, 0.25),
    (2, 0, 0.4167),
    (3, 2, 0.4),
  ]


def test_bias_selects_but_does_not_weigh():
  # Expert 2 has a bias of 0.5. Token 0 has the biased scores 0.9, 0.6 and 0.8 and the gates 0.9/1.2
  # and 0.3/1.2. Token 1 has the scores 0.2, 0.1 and 1.1 and the same gates as without bias. Token 2
  # has the scores 0.5, 0.7 and 0.9 and the gates 0.4/1.1 and 0.7/1.1. Token 3 has the scores 0.1,
  # 0.3 and 0.7 and the gates 0.2/0.5 and 0.3/0.5. Catches s + b in the gate, and a bias without
  # effect.
  bias = [0.0, 0.0, 0.5]
  assert _triples(LOGITS, bias, k=2) == [
    (0, 0, 0.75),
    (1, 2, 0.75),
    (2, 2, 0.3636),
    (3, 2, 0.4),
    (0, 2, 0.25),
    (1, 0, 0.25),
    (2, 1, 0.6364),
    (3, 1, 0.6),
  ]
  raw = _triples(LOGITS, bias, k=1, gate_norm="none")
  assert raw == [(0, 0, 0.9), (1, 2, 0.6), (2, 2, 0.4), (3, 2, 0.2)]


def test_groups_by_their_two_best_biased_scores():
  # The groups are (0.9, 0.1) and (0.6, 0.5). The second has the larger sum, 1.1 against 1.0. With a
  # bias of 0.2 on expert 1, the first has 1.2. Catches groups that are ranked by their best expert
  # (DeepSeek-V2), or by unbiased scores.
  s = np.array([[0.9, 0.1, 0.6, 0.5]])
  logits = jnp.asarray(np.log(s / (1 - s)), jnp.float32)
  options = {"k": 2, "groups": 2, "kept_groups": 1}
  assert _triples(logits, **options) == [(0, 2, 0.5455), (0, 3, 0.4545)]  # The sum is 1.1.
  assert _triples(logits, [0.0, 0.2, 0.0, 0.0], **options) == [(0, 0, 0.9), (0, 1, 0.1)]


@pytest.mark.parametrize(
  "options",
  [
    {"k": 3, "groups": 4, "kept_groups": 2},
    {"k": 4, "groups": 2, "kept_groups": 1, "gate_norm": "none", "priority": "token"},
    {"k": 8},
    {"k": 2, "groups": 8, "kept_groups": 3},
  ],
)
def test_equals_the_oracle(options):
  # Catches the faults above on 60 draws of 8 experts, errors at K = E and with groups of one
  # expert, and padding that takes an expert.
  compare.check_oracle(sigmoid_bias, oracle, _draw_logits(1), compare.draw_context(1), **options)


def test_equals_the_oracle_with_a_bias():
  # Catches a bias that is left out of the score of a group, or that orders tokens.
  context = compare.draw_context(2, bias=np.float32(np.random.default_rng(0).normal(size=8) * 0.2))
  compare.check_oracle(
    sigmoid_bias, oracle, _draw_logits(2), context, k=3, groups=4, kept_groups=2, priority="gate"
  )


@pytest.mark.parametrize(("tokens", "experts"), [(1, 1), (4, 1), (1, 6)])
def test_corners(tokens, experts):
  # Catches errors at E = 1 and S = 1.
  compare.check_oracle(
    sigmoid_bias,
    oracle,
    compare.draw_logits(3, 5, tokens, experts),
    compare.draw_context(3, 5, tokens),
    k=1,
    gate_norm="none",
  )


def test_appended_padding_changes_nothing():
  # Catches rows of padding that count.
  compare.check_appended_padding(sigmoid_bias, k=2, groups=4, kept_groups=3, priority="gate")


def test_gates_survive_underflow():
  # sigmoid(-200) is 0 in float32. Catches 0/0 in the renormalisation and in its gradient.
  logits = jnp.array([[-200.0, -201.0, -300.0]])
  gate = jax.jit(lambda l: sigmoid_bias(l, RoutingContext(), k=2).gate)
  # The ratio of the sigmoids is e^-200 to e^-201.
  np.testing.assert_allclose(gate(logits), jax.nn.softmax(jnp.array([1.0, 0.0])), rtol=1e-5)
  assert np.all(np.isfinite(jax.grad(lambda l: jnp.sum(jnp.sin(gate(l))))(logits)))


def test_router_gradient():
  # Catches a gate without gradient, and a gradient at K = 1, where the gate is constant.
  variants = [{"k": 1, "gate_norm": "none"}, {"k": 2}, {"k": 3}, {"k": 1}]
  *learning, constant = compare.gradients(sigmoid_bias, LOGITS, RoutingContext(), variants)
  for gradient in learning:
    assert np.all(np.isfinite(gradient)) and np.abs(gradient).max() > 0.01
  assert not np.any(constant)  # The gate is the constant 1, as the docstring says.


def test_the_bias_has_no_gradient():
  # Catches a balancing bias that the loss of the task trains.
  def loss(bias):
    return jnp.sum(jnp.sin(sigmoid_bias(LOGITS, RoutingContext(bias=bias), k=2).gate))

  assert not np.any(jax.jit(jax.grad(loss))(jnp.array([0.0, 0.0, 0.5])))


@pytest.mark.parametrize(
  ("options", "field"),
  [
    ({"groups": 2}, "groups"),
    ({"groups": 3, "kept_groups": 4}, "kept_groups"),
    ({}, "k=8"),
    ({"k": 2, "groups": 3}, "k=2"),
    ({"k": 2, "gate_norm": "topk"}, "gate_norm"),
    ({"k": 2, "priority": "random"}, "priority"),
  ],
)
def test_bad_options_are_named(options, field):
  # Catches an error inside XLA instead of one that names the option.
  with pytest.raises(ConfigError, match=f"sigmoid_bias.{field}"):
    sigmoid_bias(LOGITS, RoutingContext(), **options)


def test_bfloat16_logits_give_float32_gates():
  # Catches sigmoids in the model's dtype.
  plan = jax.jit(functools.partial(sigmoid_bias, k=3))(
    LOGITS.astype(jnp.bfloat16), RoutingContext()
  )
  assert plan.gate.dtype == jnp.float32
  np.testing.assert_allclose(np.asarray(plan.gate).reshape(3, 4).sum(axis=0), 1.0, rtol=1e-6)


def test_looks_ahead_default_is_the_routers_default():
  # Catches defaults that differ from those of the router.
  assert ROUTER.leak() == "overflow"
  assert ROUTER.leak(priority="gate") == "yes" and ROUTER.leak(k=1) == "no"
