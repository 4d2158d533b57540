"""Tests token choice by named parts by hand, against the oracle, and far from 0."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from oracles import compare
from oracles.scored_top_k import scored_top_k as oracle

from moe_jax.errors import ConfigError
from moe_jax.routing import ROUTERS, RoutingContext
from moe_jax.routing.scored_top_k import ROUTER, SCORES, log_sqrt_softplus, scored_top_k

pytestmark = pytest.mark.numerics

# The square roots of log(1 + e^x) are 2, 1, 3 and 0.5.
ROOTS = np.array([[2.0, 1.0, 3.0, 0.5]])
LOGITS = jnp.asarray(np.log(np.expm1(ROOTS**2)), jnp.float32)


def _triples(logits, bias=None, **options):
  route = jax.jit(functools.partial(scored_top_k, **options))
  plan = route(logits, RoutingContext(bias=None if bias is None else jnp.asarray(bias)))
  return [(t, e, round(g, 4)) for t, e, g in reference.assignments(plan)]


def _draw_logits(seed, **options):
  """Returns logits of which no two are x and -x, whose sigmoids would tie up to rounding."""
  return compare.draw_logits(seed, **options) + np.float32(1 / 256)


def test_sqrt_softplus_by_hand():
  # Experts 2 and 0 have the scores 3 and 2, which are gates of 3/5 and 2/5, or 3/6 and 2/6 with an
  # eps of 1. Catches a softplus without root, and an eps that is left out.
  assert _triples(LOGITS, score="sqrt_softplus") == [(0, 2, 0.6), (0, 0, 0.4)]
  assert _triples(LOGITS, score="sqrt_softplus", norm_eps=1.0) == [(0, 2, 0.5), (0, 0, 0.3333)]
  assert _triples(LOGITS, score="sqrt_softplus", gate_norm="none") == [(0, 2, 3.0), (0, 0, 2.0)]


def test_the_bias_is_added_to_scores_or_to_logits():
  # With 1.5 on expert 1 the scores are 2, 2.5, 3 and 0.5, so that it comes second. The logits are
  # 3.98, 0.54, 9.0 and -1.26, where 1.5 is too little and 3.6 is enough. Catches a bias on the
  # wrong one of the two, and a gate with the bias.
  bias = np.array([0.0, 1.0, 0.0, 0.0], np.float32)
  options = {"score": "sqrt_softplus", "gate_norm": "none"}
  assert _triples(LOGITS, 1.5 * bias, **options) == [(0, 2, 3.0), (0, 1, 1.0)]
  assert _triples(LOGITS, 1.5 * bias, bias_on="logits", **options) == [(0, 2, 3.0), (0, 0, 2.0)]
  assert _triples(LOGITS, 3.6 * bias, bias_on="logits", **options) == [(0, 2, 3.0), (0, 1, 1.0)]


def test_groups_by_their_best_or_by_their_two_best():
  # The probabilities of the groups are (0.4, 0.05) and (0.3, 0.25), so that the first has the best
  # expert and the second the larger sum. Catches a rule that is ignored.
  logits = jnp.log(jnp.asarray([[0.4, 0.05, 0.3, 0.25]]))
  options = {"groups": 2, "gate_norm": "none"}
  assert _triples(logits, group_score="max", **options) == [(0, 0, 0.4), (0, 1, 0.05)]
  assert _triples(logits, group_score="top_2_sum", **options) == [(0, 2, 0.3), (0, 3, 0.25)]


CASES = [
  {"k": 3, "score": "sqrt_softplus"},
  {"k": 2, "score": "sqrt_softplus", "gate_norm": "none", "groups": 4, "kept_groups": 2},
  {"k": 3, "score": "sigmoid", "norm_eps": 0.5, "priority": "token"},
  {"k": 3, "score": "softmax", "norm_eps": 0.5, "groups": 4, "kept_groups": 2},
  {"k": 2, "score": "softmax", "groups": 2, "group_score": "max", "gate_norm": "none"},
  {"k": 8, "score": "sqrt_softplus", "priority": "gate"},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_equals_the_oracle(options):
  # Catches the faults above on 60 draws of 8 experts, errors at K = E, and padding that takes an
  # expert. Where rounding would decide between sums, or between tokens with equal scores, no
  # logits are equal.
  rounded = options["score"] == "sqrt_softplus" or "priority" in options or "groups" in options
  logits = _draw_logits(1, tied=0 if rounded else 10)
  compare.check_oracle(scored_top_k, oracle, logits, compare.draw_context(1), **options)


@pytest.mark.parametrize(
  "options", [*CASES, {"k": 3, "score": "sigmoid", "bias_on": "logits"}], ids=str
)
def test_equals_the_oracle_with_a_bias(options):
  # Catches a bias that is left out of the score of a group, or that orders tokens.
  context = compare.draw_context(2, bias=np.float32(np.random.default_rng(0).normal(size=8) * 0.2))
  compare.check_oracle(scored_top_k, oracle, _draw_logits(2, tied=0), context, **options)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("tokens", "experts"), [(1, 1), (4, 1), (1, 6)])
def test_corners(score, tokens, experts):
  # Catches errors at E = 1 and S = 1.
  logits, context = compare.draw_logits(3, 5, tokens, experts), compare.draw_context(3, 5, tokens)
  options = {"k": 1, "score": score, "gate_norm": "none"}
  compare.check_oracle(scored_top_k, oracle, logits, context, **options)


@pytest.mark.parametrize(
  ("form", "options", "parts"),
  [
    ("top_k", {"k": 2}, {"score": "softmax"}),
    (
      "device_limited",
      {"k": 2, "groups": 4, "kept_groups": 2, "gate_norm": "none"},
      {"score": "softmax", "group_score": "max"},
    ),
    ("sigmoid_bias", {"k": 2, "groups": 4, "kept_groups": 2}, {"score": "sigmoid"}),
  ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_other_routers_are_forms_of_it(form, options, parts, bias):
  # Catches a form whose parts are not those that its paper has, such as another rule for groups.
  context = RoutingContext(bias=jnp.linspace(-0.2, 0.2, 8) if bias else None)
  logits = jnp.asarray(compare.draw_logits(4, groups=1, tokens=64)[0])
  ours = jax.jit(functools.partial(scored_top_k, **options, **parts))(logits, context)
  theirs = jax.jit(functools.partial(ROUTERS[form].route, **options))(logits, context)
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_appended_padding_changes_nothing():
  # Catches rows of padding that count.
  options = {"k": 2, "score": "sqrt_softplus", "groups": 4, "kept_groups": 3, "priority": "gate"}
  compare.check_appended_padding(scored_top_k, **options)


def test_the_logarithm_of_the_root_is_exact_everywhere():
  # Catches log(0) below about -88, where e^x underflows, an error where the two formulas meet, and
  # a gradient that is not finite.
  x = np.array([-1e4, -200.0, -30.0, -10.001, -10.0, -9.999, -1.0, 0.0, 5.0, 100.0, 1e4])
  expected = [0.5 * (v if v < -40 else math.log(np.logaddexp(v, 0.0))) for v in x]
  rows = x.astype(np.float32)[None]
  value = jax.jit(log_sqrt_softplus)(rows)[0]
  slope = jax.jit(jax.grad(lambda rows: jnp.sum(log_sqrt_softplus(rows))))(rows)[0]
  np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-6)
  sigmoid = 1 / (1 + np.exp(-np.maximum(x, -500)))
  slopes = [
    0.5 if v < -40 else 0.5 * s / np.logaddexp(v, 0.0) for v, s in zip(x, sigmoid, strict=True)
  ]
  np.testing.assert_allclose(slope, slopes, rtol=1e-4)


@pytest.mark.parametrize("bias", [None, np.zeros(4, np.float32)])
@pytest.mark.parametrize("score", SCORES)
def test_the_second_choice_is_the_second_logit(score, bias):
  # Catches a choice by scores that all underflow, or that are all equal in float32.
  run = jax.jit(functools.partial(scored_top_k, k=2, score=score))
  for logits in ([200.0, 0.0, 50.0, 60.0], [-200.0, -900.0, -400.0, -300.0]):
    plan = run(np.array([logits], np.float32), RoutingContext(bias=bias))
    assert plan.expert.tolist() == [0, 3], logits


@pytest.mark.parametrize("shift", [-1e4, -60.0, 0.0, 60.0, 1e4])
@pytest.mark.parametrize("score", SCORES)
def test_gates_and_their_gradients_stay_finite(score, shift):
  # Catches a division by a sum that underflows, with eps and without, in a gate or its derivative.
  logits = np.random.default_rng(1).normal(size=(8, 4)).astype(np.float32) * 8 + np.float32(shift)
  context = RoutingContext(bias=jnp.zeros(4))
  for options in ({"gate_norm": "none"}, {}, {"norm_eps": 1e-20}):

    def total(x, options=options):
      plan = scored_top_k(x, context, k=2, score=score, **options)
      return jnp.sum(plan.gate * jnp.arange(1.0, plan.gate.size + 1))

    value, slope = jax.jit(jax.value_and_grad(total))(logits)
    assert np.isfinite(value) and np.isfinite(slope).all()


@pytest.mark.parametrize("score", SCORES)
def test_router_gradient(score):
  # The gradient is compared with differences of the oracle's gates. Catches a gate without
  # gradient, one through the choice, and a gradient at K = 1, where the gate is constant.
  logits = np.array([[0.5, -0.3, 1.2, 0.1]], np.float32)
  variants = [{"k": 2, "score": score} | o for o in ({}, {"gate_norm": "none"}, {"norm_eps": 0.5})]
  constant = {"k": 1, "score": score}
  *ours, zero = compare.gradients(scored_top_k, logits, RoutingContext(), [*variants, constant])

  def loss(x, options):
    return sum(math.sin(g) for _, _, g in oracle(x, RoutingContext(), **options))

  for slope, options in zip(ours, variants, strict=True):
    for e in range(4):
      step = 1e-5 * np.eye(4)[e : e + 1]
      x = logits.astype(np.float64)
      difference = (loss(x + step, options) - loss(x - step, options)) / 2e-5
      assert slope[0, e] == pytest.approx(difference, abs=2e-5), (options, e)
  assert not np.any(zero)


def test_the_bias_has_no_gradient():
  # Catches a balancing bias that the loss of the task trains.
  def loss(bias):
    return jnp.sum(
      jnp.sin(scored_top_k(LOGITS, RoutingContext(bias=bias), score="sqrt_softplus").gate)
    )

  assert not np.any(jax.jit(jax.grad(loss))(jnp.array([0.0, 0.0, 0.5, 0.0])))


def test_balancing_sees_what_the_bias_is_added_to():
  # Catches a rule of balancing that compares the bias with other scores than the router does.
  assert ROUTER.biased is not None
  np.testing.assert_allclose(ROUTER.biased(LOGITS, score="sqrt_softplus"), ROOTS, rtol=1e-5)
  np.testing.assert_allclose(ROUTER.biased(LOGITS), jax.nn.softmax(LOGITS), rtol=1e-6)
  np.testing.assert_array_equal(
    ROUTER.biased(LOGITS, score="sigmoid", bias_on="logits"), np.asarray(LOGITS)
  )


@pytest.mark.parametrize(
  ("options", "field"),
  [
    ({"groups": 3}, "groups"),
    ({"groups": 2, "kept_groups": 3}, "kept_groups"),
    ({"k": 5}, "k=5"),
    ({"k": 3, "groups": 2}, "k=3"),
    ({"score": "sigmoids"}, "score"),
    ({"bias_on": "score"}, "bias_on"),
    ({"bias_on": "logits", "groups": 2}, "bias_on"),
    ({"group_score": "sum"}, "group_score"),
    ({"gate_norm": "topk"}, "gate_norm"),
    ({"norm_eps": -1.0}, "norm_eps"),
    ({"priority": "random"}, "priority"),
  ],
)
def test_bad_options_are_named(options, field):
  # Catches an error inside XLA instead of one that names the option.
  with pytest.raises(ConfigError, match=f"scored_top_k.{field}"):
    scored_top_k(LOGITS, RoutingContext(), **options)


def test_bfloat16_logits_give_float32_gates():
  # Catches scores in the model's dtype.
  route = jax.jit(functools.partial(scored_top_k, k=4, score="sqrt_softplus"))
  plan = route(LOGITS.astype(jnp.bfloat16), RoutingContext())
  assert plan.gate.dtype == jnp.float32
  np.testing.assert_allclose(np.asarray(plan.gate).sum(), 1.0, rtol=1e-6)


def test_looks_ahead_default_is_the_routers_default():
  # Catches defaults that differ from those of the router.
  assert ROUTER.leak() == "overflow"
  assert ROUTER.leak(priority="gate") == "yes" and ROUTER.leak(k=1) == "no"
