"""Tests noisy top-K gating by hand and against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from oracles import draws
from oracles import noisy_top_k as oracle
from oracles.compare import check_oracle, draw_tied_logits, draw_valid

from moe_jax.errors import ConfigError
from moe_jax.routing import RoutingContext, losses
from moe_jax.routing.noisy_top_k import ROUTER, load, noisy_logits, noisy_top_k

pytestmark = pytest.mark.numerics

PROBS = np.array([[0.5, 0.3, 0.2], [0.3, 0.1, 0.6], [0.8, 0.15, 0.05], [0.1, 0.7, 0.2]])
LOGITS = jnp.log(jnp.asarray(PROBS, jnp.float32))
NOISY = RoutingContext(key=jax.random.key(1), noise_std=0.5 * jnp.ones((4, 3)), train=True)


_route = jax.jit(noisy_top_k, static_argnames=("k", "noise_floor", "priority"))


def _rounded(plan):
  return [(t, e, round(g, 4)) for t, e, g in reference.assignments(plan)]


def test_by_hand_without_noise():
  # The first gates are 0.5/(0.5+0.3) = 0.625, 0.6/0.9 = 0.6667, 0.8/0.95 = 0.8421 and 0.7/0.9 =
  # 0.7778, and the second gates are the differences to 1. Catches a softmax over all experts,
  # token-major order as the default, and a noise_std that is required without noise.
  assert _rounded(_route(LOGITS, RoutingContext(), k=2)) == [
    (0, 0, 0.625),
    (1, 2, 0.6667),
    (2, 0, 0.8421),
    (3, 1, 0.7778),
    (0, 1, 0.375),
    (1, 0, 0.3333),
    (2, 1, 0.1579),
    (3, 2, 0.2222),
  ]


def test_noise_is_in_choice_and_gate():
  # With zero logits and sigma = 1 + 1, H is 2 eps. If a and b are the two largest eps of the token,
  # the first gate is 1/(1 + exp(2(b - a))). Catches gates of the clean logits, and a noise_floor
  # that replaces the deviation or is ignored.
  context = RoutingContext(key=jax.random.key(3), noise_std=jnp.ones((1, 4)), train=True)
  eps = draws.normal(context.key, (1, 4))[0]
  first, second = np.argsort(-eps)[:2]
  gate = 1 / (1 + np.exp(2 * (eps[second] - eps[first])))
  actual = reference.assignments(_route(jnp.zeros((1, 4)), context, k=2, noise_floor=1.0))
  assert [a[:2] for a in actual] == [(0, first), (0, second)]
  np.testing.assert_allclose([a[2] for a in actual], [gate, 1 - gate], rtol=1e-5)


@pytest.mark.parametrize("context", [NOISY.replace(key=None), NOISY.replace(train=False)])
def test_no_noise_without_key_or_training(context):
  # Catches noise in evaluation.
  assert _rounded(_route(LOGITS, context, k=2)) == _rounded(_route(LOGITS, RoutingContext(), k=2))


@pytest.mark.parametrize(
  ("tokens", "experts", "train", "options"),
  [
    (12, 6, True, {"priority": "gate"}),
    (12, 6, False, {"k": 2, "priority": "gate"}),
    (12, 6, False, {}),
    (12, 6, True, {"k": 3, "priority": "token", "noise_floor": 0.25}),
    (12, 4, False, {"k": 4}),
    (12, 1, False, {"k": 1}),
    (1, 6, False, {"k": 2}),
  ],
)
def test_equals_the_oracle(tokens, experts, train, options):
  # Outside training the draws have ties. Catches a different order, tie rule, stream of noise or
  # softmax.
  rng = np.random.default_rng(experts)
  context = RoutingContext(
    key=jax.random.split(jax.random.key(0), 50),
    train=train,
    valid=draw_valid(rng, 50, tokens),
    noise_std=np.float32(rng.uniform(0.1, 2.0, (50, tokens, experts))),
    bias=jnp.arange(experts) % 2 * 0.5 if train else None,
  )
  check_oracle(
    noisy_top_k, oracle.noisy_top_k, draw_tied_logits(rng, 50, tokens, experts), context, **options
  )


def test_padding_changes_nothing_for_others():
  # Catches noise that depends on the number of rows, and padding that is served or ranked.
  key = jax.random.key(0)
  logits, std = jax.random.normal(key, (9, 5)), jnp.ones((9, 5))
  context = RoutingContext(key=key, noise_std=std, valid=jnp.arange(9) < 6, train=True)
  padded = _route(logits, context, k=2, priority="gate")
  alone = _route(logits[:6], context.replace(noise_std=std[:6], valid=None), k=2, priority="gate")
  assert _rounded(padded) == _rounded(alone)
  padding = np.asarray(padded.token) >= 6
  assert not np.any(np.asarray(padded.gate)[padding]) and np.all(
    np.asarray(padded.expert)[padding] == 5
  )


def test_bias_selects_but_does_not_weigh():
  # For token 0, log 0.2 + 0.5 exceeds log 0.3, and the gates are 0.5/0.7 and 0.2/0.7. Catches a
  # biased gate, and a bias that gets gradient.
  def plan(bias):
    return _route(LOGITS[:1], RoutingContext(bias=bias), k=2)

  assert _rounded(plan(jnp.array([0.0, 0.0, 0.5]))) == [(0, 0, 0.7143), (0, 2, 0.2857)]
  assert not np.any(
    jax.grad(lambda bias: jnp.sum(jnp.square(plan(bias).gate)))(jnp.array([0.0, 0.0, 0.5]))
  )


def test_gradient_flows_into_logits_and_noise():
  # H is l + eps sigma, so dL/dsigma is eps dL/dl. Catches a stop_gradient on either, and gates of
  # the clean logits.
  def loss(l, std):
    return jnp.sum(jnp.square(_route(l, NOISY.replace(noise_std=std), k=2).gate))

  by_logits, by_std = jax.grad(loss, argnums=(0, 1))(LOGITS, NOISY.noise_std)
  assert np.abs(by_logits).max() > 0.01 and np.all(np.isfinite(by_logits))
  np.testing.assert_allclose(
    by_std, draws.normal(NOISY.key, (4, 3)) * by_logits, rtol=1e-5, atol=1e-7
  )


def test_gate_is_constant_at_one_expert_a_token():
  # The docstring warns of this case. Catches a change of the gate that the docstring does not
  # mention.
  def loss(l):
    return jnp.sum(jnp.square(_route(l, RoutingContext(), k=1).gate))

  value, gradient = jax.value_and_grad(loss)(LOGITS)
  assert float(value) == 4.0 and not np.any(gradient)


def test_noisy_logits_are_those_of_the_router():
  # Catches noise that is drawn a second time, a different floor, and noise in evaluation.
  noisy = noisy_logits(LOGITS, NOISY, 0.5)
  np.testing.assert_allclose(
    noisy, np.asarray(LOGITS) + draws.normal(NOISY.key, (4, 3)), rtol=1e-5, atol=1e-6
  )
  plan = _route(LOGITS, NOISY, k=1, noise_floor=0.5)
  np.testing.assert_array_equal(plan.expert, jnp.argmax(noisy, axis=-1))
  np.testing.assert_array_equal(noisy_logits(LOGITS, NOISY.replace(train=False), 0.5), LOGITS)


def test_load_is_about_the_routers_noise():
  # H is logits + eps (0.5 + 0.5), so sigma is 1. Catches a sigma without the floor, different
  # noise, and padding that counts.
  valid = jnp.array([True, True, True, False])
  noisy = LOGITS + draws.normal(NOISY.key, (4, 3)).astype(np.float32)
  actual = jax.jit(lambda l, c: load(l, c, k=2, noise_floor=0.5, priority="gate"))(
    LOGITS, NOISY.replace(valid=valid)
  )
  expected = jax.jit(lambda l, n: losses.load(l, n, None, 2, 1.0))(LOGITS[:3], noisy[:3])
  assert float(actual) == pytest.approx(float(expected), rel=1e-4) and float(actual) > 0.01
  # The default of the floor is that of the router.
  assert float(load(LOGITS, NOISY, k=2)) == float(load(LOGITS, NOISY, k=2, noise_floor=0.0))
  assert float(load(LOGITS, NOISY, k=2)) != float(load(LOGITS, NOISY, k=2, noise_floor=1.0))


def test_bfloat16_is_computed_in_float32():
  # Catches noise or a softmax in the model's dtype.
  context = NOISY.replace(noise_std=NOISY.noise_std.astype(jnp.bfloat16))
  plan = _route(LOGITS.astype(jnp.bfloat16), context, k=2)
  assert plan.gate.dtype == jnp.float32
  np.testing.assert_allclose(np.asarray(plan.gate[:4] + plan.gate[4:]), 1.0, rtol=1e-6)


@pytest.mark.parametrize(
  ("options", "field"),
  [
    ({"k": 4}, "noisy_top_k.k="),
    ({"k": 0}, "noisy_top_k.k="),
    ({"k": 1, "noise_floor": -0.1}, "noise_floor"),
    ({"k": 1, "priority": "first"}, "priority"),
  ],
)
def test_bad_options_are_named(options, field):
  # Catches K > E that fails inside lax.top_k, noise with a negative deviation, and a KeyError.
  with pytest.raises(ConfigError, match=field):
    noisy_top_k(LOGITS, NOISY, **options)


def test_missing_deviation_is_named():
  # Catches arithmetic with None.
  with pytest.raises(ValueError, match="RoutingContext.noise_std"):
    noisy_top_k(LOGITS, NOISY.replace(noise_std=None), k=1)
  with pytest.raises(ValueError, match="RoutingContext.noise_std"):
    load(LOGITS, RoutingContext(), k=1)


def test_looks_ahead_default_is_the_routers_default():
  # A later token's first choice is served before an earlier token's second choice. Catches a
  # changed default of the router or of `looks_ahead`.
  assert (
    ROUTER.leak() == "overflow"
    and ROUTER.leak(priority="gate") == "yes"
    and ROUTER.leak(k=1) == "no"
  )
  plan = _route(jnp.zeros((2, 5)), RoutingContext())
  assert plan.token.shape == (2 * 4,) and list(plan.token[:3]) == [0, 1, 0]
