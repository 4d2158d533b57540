"""Tests S-BASE by hand and against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from oracles import compare
from oracles.sinkhorn import sinkhorn as oracle

from moe_jax.errors import ConfigError
from moe_jax.routing import RoutingContext
from moe_jax.routing.sinkhorn import ROUTER, balanced, sinkhorn

pytestmark = pytest.mark.numerics

# The probabilities of two experts. The odds of expert 0 are 9, 4, 1.5 and 1/1.5.
PROBS = np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.4, 0.6]])
LOGITS = jnp.log(jnp.asarray(PROBS, jnp.float32))
TRAIN, EVAL = RoutingContext(train=True), RoutingContext(train=False)
_sinkhorn, _balanced = jax.jit(sinkhorn), jax.jit(balanced, static_argnums=(2, 3))


def _triples(logits, context):
  return [(t, e, round(g, 4)) for t, e, g in reference.assignments(_sinkhorn(logits, context))]


def test_by_hand():
  # Balance divides all odds of expert 0 by one c such that the sum of odds/(odds + c) is 2. At c =
  # 2.5 it is 0.783 + 0.615 + 0.375 + 0.211 = 1.98, so c is slightly less. Tokens 0 and 1 keep
  # expert 0 (with odds 9/c and 4/c), and token 2 leaves it (1.5/c). Gates are unbalanced
  # probabilities. Catches missing balance, gates from the transport plan, and rows and columns that
  # are mixed up.
  assert _triples(LOGITS, TRAIN) == [(0, 0, 0.9), (1, 0, 0.8), (2, 1, 0.4), (3, 1, 0.6)]


def test_logits_decide_outside_training():
  # Catches balance at inference.
  assert _triples(LOGITS, EVAL) == [(0, 0, 0.9), (1, 0, 0.8), (2, 0, 0.6), (3, 1, 0.6)]


@pytest.mark.parametrize(
  ("train", "options"),
  [
    (True, {}),
    (True, {"k": 3, "temperature": 0.5, "priority": "token"}),
    (True, {"k": 8, "iterations": 2}),
    (False, {"k": 3}),
  ],
)
def test_equals_the_oracle(train, options):
  # Catches rows that are scaled before columns (which makes a difference after 2 iterations),
  # padding in the sums of columns, and a different target.
  compare.check_oracle(
    sinkhorn, oracle, compare.draw_logits(1), compare.draw_context(1, train=train), **options
  )


def test_equals_the_oracle_by_priority():
  # Catches tokens that are ordered by the transport plan instead of the probability. There are no
  # ties here, because rounding would distinguish tokens that have the same probabilities at
  # different experts.
  logits, context = compare.draw_logits(2, tied=0), compare.draw_context(2)
  compare.check_oracle(sinkhorn, oracle, logits, context, k=2, priority="gate")


@pytest.mark.parametrize("experts", [1, 6])
def test_corners(experts):
  # Catches errors at E = 1 and S = 1. With 6 experts the test runs outside training only, because
  # the plan of a single token is 1/6 for each expert, which is a tie that rounding decides.
  logits, context = (
    compare.draw_logits(3, 5, 1, experts),
    compare.draw_context(3, 5, 1, train=experts == 1),
  )
  compare.check_oracle(sinkhorn, oracle, logits, context)


@pytest.mark.parametrize("padded", [False, True])
def test_marginals(padded):
  # Catches columns that include padding, a target other than T/E, and too little normalisation.
  valid = np.arange(48) % 3 > 0 if padded else np.ones(48, bool)
  logits = jnp.asarray(compare.draw_logits(4, 1, 48)[0])
  log_p = _balanced(logits, jnp.asarray(valid) if padded else None, 200, 1.0)
  p = np.exp(np.asarray(log_p, np.float64))[valid]
  np.testing.assert_allclose(p.sum(axis=1), 1.0, rtol=1e-5)
  np.testing.assert_allclose(p.sum(axis=0), valid.sum() / 8, rtol=1e-3)


def test_closer_to_balance_than_the_best_expert():
  # Catches a sign error in the scaling, with which popular experts would get even more tokens.
  logits = jnp.asarray(compare.draw_logits(5, 1, 64)[0]) + 3.0 * (jnp.arange(8) < 2)

  def load(context):
    return np.bincount(_sinkhorn(logits, context).expert, minlength=8)

  # A balanced load is 8.
  assert load(EVAL).max() > 20 and load(TRAIN).max() < 14 and load(TRAIN).min() > 3


def test_constants_by_expert_change_nothing():
  # Catches columns that are scaled too early, too late or incompletely.
  logits = jnp.asarray(compare.draw_logits(6, 1, 64)[0])
  shifted = logits + jnp.linspace(-20.0, 20.0, 8)
  np.testing.assert_array_equal(_sinkhorn(logits, TRAIN).expert, _sinkhorn(shifted, TRAIN).expert)
  assert np.any(_sinkhorn(logits, EVAL).expert != _sinkhorn(shifted, EVAL).expert)


def test_extreme_logits_stay_finite():
  # Catches sums that are not computed with logarithms, which underflow.
  logits = jnp.asarray(compare.draw_logits(7, 1, 64)[0]) * 50.0
  assert np.all(np.isfinite(_balanced(logits, None, 30, 0.1)))


def test_appended_padding_changes_nothing():
  # Catches rows of padding in the sums of columns.
  compare.check_appended_padding(sinkhorn, k=2)


def test_router_gradient():
  # d sin(p_i) / d x_j is cos(p_i) p_i (1[i=j] - p_j). Catches a gradient through the transport
  # plan, and a gate without gradient.
  (gradient,) = compare.gradients(sinkhorn, LOGITS, TRAIN, [{}])
  chosen = np.array([0, 0, 1, 1])
  p = PROBS[np.arange(4), chosen]
  expected = (np.cos(p) * p)[:, None] * (np.eye(2)[chosen] - PROBS)
  np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
  ("options", "field"),
  [
    ({"k": 3}, "k"),
    ({"iterations": 0}, "iterations"),
    ({"temperature": 0.0}, "temperature"),
    ({"priority": "x"}, "priority"),
  ],
)
def test_bad_options_are_named(options, field):
  # Catches an error inside XLA, or NaN, instead of an error that names the option.
  with pytest.raises(ConfigError, match=f"sinkhorn.{field}"):
    sinkhorn(LOGITS, TRAIN, **options)


def test_bfloat16_logits_give_float32_gates():
  # Catches sums in the model's dtype.
  plan = _sinkhorn(LOGITS.astype(jnp.bfloat16), TRAIN)
  assert plan.gate.dtype == jnp.float32 and plan.expert.tolist() == [0, 0, 1, 1]


def test_looks_ahead():
  # Catches a declared leak other than "yes".
  assert ROUTER.leak() == "yes"
  # If tokens 0 and 1 are alone, one must leave expert 0, as 9/(9 + c) + 4/(4 + c) = 1 at c = 6.
  assert _sinkhorn(LOGITS, RoutingContext(valid=jnp.arange(4) < 2, train=True)).expert.tolist() == [
    0,
    1,
    2,
    2,
  ]
