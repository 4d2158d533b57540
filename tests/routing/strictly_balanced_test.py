"""Tests strictly balanced gating and its threshold loss by hand and against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from oracles import strictly_balanced as oracle
from oracles.compare import check_oracle, draw_tied_logits, draw_valid

from moe_jax.errors import ConfigError
from moe_jax.routing import RoutingContext
from moe_jax.routing.strictly_balanced import ROUTER, strictly_balanced, threshold_loss

pytestmark = pytest.mark.numerics

PROBS = np.array([[0.5, 0.3, 0.2], [0.3, 0.1, 0.6], [0.8, 0.15, 0.05], [0.1, 0.7, 0.2]])
LOGITS = jnp.log(jnp.asarray(PROBS, jnp.float32))
TRAIN = RoutingContext(train=True)


_route = jax.jit(strictly_balanced, static_argnames="k")


def _rounded(plan):
  return [(t, e, round(g, 4)) for t, e, g in reference.assignments(plan)]


def test_by_hand_in_training():
  # With k = 1, m is round(4/3) = 1. Expert 0 keeps token 2 (0.8), expert 1 keeps token 3 (0.7), and
  # expert 2 keeps token 1 (0.6). Each of these tokens has one expert.
  assert _rounded(_route(LOGITS, TRAIN, k=1)) == [(2, 0, 1.0), (3, 1, 1.0), (1, 2, 1.0)]
  # With k = 2, m is round(8/3) = 3. Expert 0 keeps tokens 2 (0.8), 0 (0.5) and 1 (0.3), expert 1
  # keeps tokens 3 (0.7), 0 (0.3) and 2 (0.15), and expert 2 keeps tokens 1 (0.6), 0 and 3 (both
  # 0.2). Token 0 has all experts, and the probabilities of the others' experts are 0.3 and 0.6 for
  # token 1, 0.8 and 0.15 for token 2, and 0.7 and 0.2 for token 3. Catches a softmax over tokens,
  # gates that are not renormalised or renormalised over the wrong axis, and an m that is not
  # rounded.
  triples = _rounded(_route(LOGITS, TRAIN, k=2))
  assert triples[:7] == [
    (2, 0, 0.8421),
    (0, 0, 0.5),
    (1, 0, 0.3333),
    (3, 1, 0.7778),
    (0, 1, 0.3),
    (2, 1, 0.1579),
    (1, 2, 0.6667),
  ]
  assert sorted(triples[7:]) == [(0, 2, 0.2), (3, 2, 0.2222)]


def test_by_hand_outside_training():
  # With T = (0.25, 0.25, 0.65), expert 0 keeps tokens 0, 1 and 2, expert 1 keeps tokens 0 and 3,
  # and expert 2 keeps none. Token 0 has the probabilities 0.5 and 0.3. Catches a threshold in
  # training only, one threshold for all experts, and an order by score instead of position.
  context = RoutingContext(threshold=jnp.array([0.25, 0.25, 0.65]))
  plan = _route(LOGITS, context, k=1)
  assert _rounded(plan) == [(0, 0, 0.625), (1, 0, 1.0), (2, 0, 1.0), (0, 1, 0.375), (3, 1, 1.0)]
  assert list(plan.token) == [0, 1, 2, 3] * 3


def test_threshold_is_strict():
  # Zero logits of 4 experts give exactly 0.25. Catches >= instead of >.
  def passed(t):
    return len(reference.assignments(_route(jnp.zeros((3, 4)), RoutingContext(threshold=t), k=1)))

  assert passed(0.25 * jnp.ones(4)) == 0 and passed(0.2499 * jnp.ones(4)) == 12


def test_ties_go_to_the_earlier_token():
  # Catches an unstable sort.
  assert [a[:2] for a in _rounded(_route(jnp.zeros((4, 2)), TRAIN, k=1))] == [
    (0, 0),
    (1, 0),
    (0, 1),
    (1, 1),
  ]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
  ("tokens", "experts", "k", "padded"),
  [
    (12, 6, 4, True),
    (12, 6, 4, False),
    (12, 6, 1, True),
    (12, 4, 4, True),
    (12, 1, 1, True),
    (1, 6, 2, False),
  ],
)
def test_equals_the_oracle(tokens, experts, k, padded, train):
  # Catches padding that is kept or counted in a sum, a different tie rule or order, and m = 0 at
  # S = 1.
  rng = np.random.default_rng(experts)
  context = RoutingContext(
    valid=draw_valid(rng, 50, tokens) if padded else None,
    train=train,
    threshold=jnp.asarray(rng.uniform(0.05, 0.4, experts), jnp.float32),
  )
  check_oracle(
    strictly_balanced,
    oracle.strictly_balanced,
    draw_tied_logits(rng, 50, tokens, experts),
    context,
    k=k,
  )


def test_padding_changes_nothing_for_others():
  # Outside training, the number of rows of padding must not matter. In training, their content must
  # not matter, whereas their number changes m (2 * 6 / 3 = 4). Catches padding above a threshold or
  # among the best tokens.
  context = RoutingContext(threshold=0.25 * jnp.ones(3), valid=jnp.arange(6) < 4)

  def padded(value):
    return jnp.concatenate([LOGITS, jnp.array([[value, 0.0, 0.0]] * 2)])

  outside = [
    _route(l, c, k=2) for l, c in ((padded(9.0), context), (LOGITS, context.replace(valid=None)))
  ]
  assert _rounded(outside[0]) == _rounded(outside[1])
  one, other = (_route(padded(value), context.replace(train=True), k=2) for value in (-9.0, 9.0))
  assert _rounded(one) == _rounded(other) and one.token.shape == (12,)
  assert {t for t, _, _ in _rounded(one)} == {0, 1, 2, 3}


@pytest.mark.parametrize("train", [True, False])
def test_router_learns(train):
  # Token 0 has at least experts 0 and 1, and token 3 has none with these thresholds. Catches a
  # stop_gradient on the gates, and the quotient 0/0 for a token without experts.
  context = RoutingContext(train=train, threshold=jnp.array([0.25, 0.25, 1.0]))
  logits = jnp.concatenate([LOGITS[:3], jnp.array([[-200.0, -300.0, 0.0]])])
  gradient = jax.grad(lambda l: jnp.sum(jnp.square(_route(l, context, k=2).gate)))(logits)
  assert np.all(np.isfinite(gradient)) and np.abs(gradient[0]).max() > 0.01
  if not train:
    assert not np.any(gradient[3])


def test_gates_survive_underflow():
  # Only experts 0 and 1 keep the token, and its probabilities for them underflow. Catches 0/0.
  context = RoutingContext(threshold=jnp.array([-1.0, -1.0, 2.0]))
  gate = _route(jnp.array([[-200.0, -201.0, 0.0]]), context, k=1).gate
  np.testing.assert_allclose(gate, [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1)), 0.0], rtol=1e-6)


def test_bfloat16_logits_are_softmaxed_in_float32():
  # Catches a softmax in the model's dtype.
  plan = _route(LOGITS.astype(jnp.bfloat16), TRAIN, k=3)
  assert plan.gate.dtype == jnp.float32
  np.testing.assert_allclose(float(jnp.sum(plan.gate)), 4.0, rtol=1e-6)


def test_threshold_loss_by_hand():
  # With k = 1, m is 1, and T is (0.4, 0.75, 0.5). For expert 0, tokens 0 (0.5) and 2 (0.8) exceed
  # the threshold and token 2 is in the batch-wise mask, which gives +1 * (0.5 - 0.4) = 0.1. For
  # expert 1, no token exceeds the threshold and token 3 is in the mask, which gives -1 * (0.7 -
  # 0.75) = 0.05. For expert 2, token 1 is in both masks, which gives 0. The mean is 0.15/4, and the
  # gradient of T is (m - tokens above T)/4 = (-1, 1, 0)/4. Catches a wrong sign of either, a sum
  # instead of a mean, and a gradient through the masks.
  def loss(l, t):
    return threshold_loss(l, t, None, 1)

  both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
  value, (by_logits, by_t) = both(LOGITS, jnp.array([0.4, 0.75, 0.5]))
  assert float(value) == pytest.approx(0.15 / 4, rel=1e-5)
  np.testing.assert_allclose(by_t, [-0.25, 0.25, 0.0])
  assert not np.any(by_logits)


def test_padding_counts_in_no_threshold():
  # There are three tokens and one row of padding, and m is round(1 * 3 / 3) = 1 = round(1 * 4 / 3).
  # Catches padding that exceeds a threshold, is kept or counts in the mean, and 0/0 without a real
  # token.
  loss = jax.jit(lambda l, valid: threshold_loss(l, jnp.array([0.4, 0.75, 0.5]), valid, 1))
  padded = jnp.concatenate([LOGITS[1:], jnp.array([[9.0, 0.0, 0.0]])])
  assert (
    float(loss(padded, jnp.arange(4) < 3))
    == pytest.approx(float(loss(LOGITS[1:], jnp.ones(3, bool))))
    != 0.0
  )
  assert float(loss(padded, jnp.zeros(4, bool))) == 0.0


def test_the_threshold_loss_of_a_single_token():
  # The threshold excludes the only token of the only expert, and m is 1, which gives -1 * (1 - 2) /
  # 1 = 1. Catches a mean over at least two tokens.
  assert float(threshold_loss(jnp.zeros((1, 1)), jnp.array([2.0]), None, 1)) == pytest.approx(1.0)


def test_descent_finds_the_batchwise_mask():
  # Descent starts from thresholds that all tokens exceed, and from thresholds that none exceeds.
  # Catches a gradient that leads away from m tokens.
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(16, 4)), jnp.float32)

  def loss(t):
    return threshold_loss(logits, t, None, 2)

  def descend(start):
    return jax.lax.fori_loop(0, 600, lambda _, t: t - 0.02 * jax.grad(loss)(t), start)

  def pairs(context):
    return {a[:2] for a in reference.assignments(_route(logits, context, k=2))}

  for threshold in jax.jit(jax.vmap(descend))(jnp.array([[0.0] * 4, [1.0] * 4])):
    assert pairs(RoutingContext(threshold=threshold)) == pairs(TRAIN)


@pytest.mark.parametrize("k", [0, 4])
def test_bad_k_is_named(k):
  # Catches m = 0, and an m that is silently clipped.
  with pytest.raises(ConfigError, match="strictly_balanced.k="):
    strictly_balanced(LOGITS, TRAIN, k=k)


def test_missing_threshold_is_named():
  # Catches a comparison with None.
  with pytest.raises(ValueError, match="RoutingContext.threshold"):
    strictly_balanced(LOGITS, RoutingContext(), k=1)


def test_looks_ahead():
  # A later token takes the place of an earlier one. Catches a declared leak of "no" or "overflow".
  assert ROUTER.leak() == "yes"

  def first(logits):
    return [a for a in reference.assignments(_route(logits, TRAIN, k=1)) if a[0] == 0]

  assert first(LOGITS[:1]) != first(LOGITS)
