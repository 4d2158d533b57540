"""Tests that auxiliary losses have the right values at balance and collapse, and ignore padding."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import RoutingContext, RoutingPlan, losses
from moe_jax.routing.top_k import top_k

pytestmark = pytest.mark.unit

S, E = 12, 4


def _plan(logits, k=2, valid=None):
  return top_k(logits, RoutingContext(valid=valid), k=k)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _balance(logits, k, counts):
  return losses.balance(*losses.balance_terms(logits, _plan(logits, k), None, counts))


# Token t prefers experts t, t+1, ... (mod E) in this order, so that every expert is equally often
# first choice, second choice and so on.
BALANCED = jnp.asarray([np.roll([3.0, 2.0, 1.0, 0.0], t) for t in range(S)], jnp.float32)
COLLAPSED = jnp.asarray([[100.0, 0.0, -1.0, -2.0]] * S, jnp.float32)


@pytest.mark.parametrize("counts", ["top_1", "all"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_balance_is_one_at_balance(k, counts):
  # Catches counting all K choices without dividing by K (flaxformer's and Hugging Face's K), LEV's
  # 1/K, and a missing E.
  assert _balance(BALANCED, k, counts) == pytest.approx(1.0, rel=1e-6)


def test_balance_at_collapse():
  # With "all" at K = 2, f is 1/2 on experts 0 and 1 and P is 1 on expert 0, which gives E/2.
  # Catches a missing E, and f or P normalised over tokens.
  assert _balance(COLLAPSED, 1, "top_1") == pytest.approx(E)
  assert _balance(COLLAPSED, 1, "all") == pytest.approx(E)
  assert _balance(COLLAPSED, 2, "top_1") == pytest.approx(E)
  assert _balance(COLLAPSED, 2, "all") == pytest.approx(E / 2)


def test_balance_by_hand():
  # Two tokens have p = (0.9, 0.1) and (0.6, 0.4) and first choice 0. Then f = (1, 0) and P = (0.75,
  # 0.25), which gives 2 * 0.75 = 1.5. With all choices at K = 2, f = (1/2, 1/2), which gives 2 *
  # 0.5 = 1.
  logits = jnp.log(jnp.array([[0.9, 0.1], [0.6, 0.4]]))
  assert _balance(logits, 2, "top_1") == pytest.approx(1.5)
  assert _balance(logits, 2, "all") == pytest.approx(1.0)


def test_balance_pushes_towards_balance_through_p_only():
  # The gradient is E/S * f (dP), so raising the logit of the overloaded expert must raise the loss.
  # Catches a stop_gradient on P.
  logits = COLLAPSED / 100.0
  gradient = jax.jit(jax.grad(lambda l: _balance(l, 2, "top_1")))(logits)
  assert np.all(np.asarray(gradient)[:, 0] > 0) and np.all(np.asarray(gradient)[:, 1:] < 0)


def test_unknown_counts():
  with pytest.raises(ValueError, match="counts"):
    losses.balance_terms(BALANCED, _plan(BALANCED), None, "top_2")


def test_z_of_zero_logits():
  # Catches a log Z that is not squared, a sum over tokens, and a logarithm to base 2.
  assert float(losses.z(jnp.zeros((S, E)), None)) == pytest.approx(math.log(E) ** 2)
  # log(e^1 + e^1) = 1 + ln 2.
  assert float(losses.z(jnp.ones((3, 2)), None)) == pytest.approx((1 + math.log(2)) ** 2)


def test_importance():
  # Catches the unbiased variance (which gives E at collapse), and a CV that is not squared.
  assert float(losses.importance(BALANCED, None)) == pytest.approx(0.0, abs=1e-9)
  assert float(losses.importance(COLLAPSED, None)) == pytest.approx(E - 1)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_load_at_balance_and_collapse(k):
  # Catches a kth_excluding that is off by one (which gives E/(K+1) - 1 at collapse), and a top_k of
  # E + 1 values at K = E.
  assert float(losses.load(BALANCED, BALANCED, None, k, 0.1)) == pytest.approx(0.0, abs=1e-6)
  collapsed = jnp.asarray([100.0 * np.arange(E, 0, -1.0)] * S, jnp.float32)
  assert float(losses.load(collapsed, collapsed, None, k, 0.1)) == pytest.approx(E / k - 1)


def test_load_by_hand():
  # One token has x = (1, 0, -1) and H = (1, 2, -1), with K = 1 and sigma = 1. Without expert i, the
  # largest H is 2, 1 and 2. So P is Phi(1 - 2), Phi(0 - 1) and Phi(-1 - 2), which are 0.15866,
  # 0.15866 and 0.00135.
  p = np.array([0.1586553, 0.1586553, 0.0013499])
  actual = losses.load(jnp.array([[1.0, 0.0, -1.0]]), jnp.array([[1.0, 2.0, -1.0]]), None, 1, 1.0)
  assert float(actual) == pytest.approx(p.var() / p.mean() ** 2, rel=1e-4)


def test_load_has_a_gradient():
  # Catches a load loss of integer counts, whose gradient is zero.
  gradient = jax.jit(jax.grad(lambda l: losses.load(l, l, None, 1, 1.0)))(COLLAPSED / 100.0)
  assert np.all(np.isfinite(gradient)) and np.abs(gradient).max() > 1e-4


def _cyclic(k, sharp=4.0):
  """Returns logits and a plan that are balanced.

  Token t prefers experts t, t + 1, ... (mod E), so that each expert gets equally many choices of
  each rank.
  """
  logits = -sharp * ((jnp.arange(E) - jnp.arange(S)[:, None]) % E).astype(jnp.float32)
  return logits, _plan(logits, k)


def _collapsed(k):
  """Returns logits and a plan that are collapsed.

  All tokens choose experts 0 to K - 1, and P is on expert 0 alone.
  """
  logits = -200.0 * jnp.tile(jnp.arange(E, dtype=jnp.float32), (S, 1))
  return logits, _plan(logits, k)


@pytest.mark.parametrize("k", [1, 2])
def test_values_of_published_losses(k):
  # Compares with the values of each publication's definition at balance and at collapse, which is a
  # multiple of ours. Catches a definition that is off by a factor of E, E^2 or K, so that published
  # coefficients could not be used.
  def value(example, counts, scores="softmax"):
    logits, plan = example
    return float(losses.balance(*losses.balance_terms(logits, plan, None, counts, scores)))

  balanced, collapsed = _cyclic(k), _collapsed(k)
  for example, top_1, every in ((balanced, 1.0, 1.0), (collapsed, E, E / k)):
    # Switch's N sum f P, Mesh-TensorFlow's loss, and GShard's times E^2.
    assert value(example, "top_1") == pytest.approx(top_1)
    # GShard's loss as printed, which is 1/E^2 and 1/E.
    assert value(example, "top_1") / E**2 == pytest.approx(top_1 / E**2)
    # DeepSeekMoE's L_ExpBal / alpha_1, which is 1, and N' at K' = 1.
    assert value(example, "all") == pytest.approx(every)
    # The losses of flaxformer and Hugging Face, which are K, and E at K = 1.
    assert k * value(example, "all") == pytest.approx(k * every)
  # Equal sigmoids give equal shares. At collapse, sigmoids are 1 on K experts and 0 elsewhere.
  assert value((jnp.zeros((S, E)), balanced[1]), "all", "sigmoid") == pytest.approx(1)
  logits = jnp.where(jnp.arange(E) < k, 50.0, -50.0) * jnp.ones((S, 1))
  assert value((logits, _collapsed(k)[1]), "all", "sigmoid") == pytest.approx(E / k)
  # The same of sqrt(softplus), which is sqrt(50) on K experts and about e^-25 elsewhere.
  assert value((jnp.zeros((S, E)), balanced[1]), "all", "sqrt_softplus") == pytest.approx(1)
  assert value((logits, _collapsed(k)[1]), "all", "sqrt_softplus") == pytest.approx(E / k)


def test_device_and_communication_losses():
  # L_DevBal / alpha_2 is 1 at balance and D at collapse. There are E = 4 experts on D = 2 devices,
  # and collapse on expert 0 uses device 0 alone. With top-2 of cyclic preferences, tokens 0 and 2
  # (mod 4) use one device and tokens 1 and 3 use both. That makes 1.5 of at most M = 2 devices per
  # token, so that f'' sums to 3/4. Catches devices whose experts are not consecutive, a missing M,
  # and tokens that are counted twice on a device.
  def device(example):
    f, p = losses.balance_terms(*example, None, "all")
    return float(losses.balance(losses.by_device(f, 2), losses.by_device(p, 2)))

  def communication(example, m):
    return float(losses.balance(*losses.communication_terms(*example, None, 2, m)))

  assert device(_cyclic(1)) == pytest.approx(1) and device(_collapsed(1)) == pytest.approx(2)
  assert communication(_cyclic(1), 1) == pytest.approx(1) and communication(
    _collapsed(1), 1
  ) == pytest.approx(2)
  assert communication(_cyclic(2), 2) == pytest.approx(0.75)
  f, _ = losses.communication_terms(*_cyclic(2), None, 2, 2)
  np.testing.assert_allclose(f, [0.375, 0.375])
  assert communication(_cyclic(4), 2) == pytest.approx(1)  # At K = E all devices get all tokens.


def test_gate_importance():
  # The gates are 0.5 and 0.9 on expert 0 and 0.5 on expert 1, so the sums are 1.4, 0.5 and 0. The
  # assignment to no expert does not count. Catches counts instead of gates, and index E that wraps
  # around to another expert.
  plan = RoutingPlan(
    token=jnp.array([0, 1, 2, 0]),
    expert=jnp.array([0, 0, 3, 1]),
    gate=jnp.array([0.5, 0.9, 0.0, 0.5]),
    num_experts=3,
  )
  sums = np.array([1.4, 0.5, 0.0])
  assert float(losses.gate_importance(plan)) == pytest.approx(
    sums.var() / sums.mean() ** 2, rel=1e-5
  )
  assert float(losses.gate_importance(_cyclic(2)[1])) == pytest.approx(0.0, abs=1e-6)
  assert float(losses.gate_importance(_collapsed(1)[1])) == pytest.approx(E - 1)
  assert float(losses.gate_importance(_plan(jnp.zeros((S, E)), 2, jnp.zeros(S, bool)))) == 0.0


@jax.jit
def _all_losses(logits, valid):
  plan = _plan(logits, 2, valid)
  return jnp.stack(
    [
      losses.balance(*losses.communication_terms(logits, plan, valid, 2, 2)),
      losses.gate_importance(plan),
      losses.balance(*losses.balance_terms(logits, plan, valid, "all", "sigmoid")),
      losses.balance(*losses.balance_terms(logits, plan, valid, "top_1")),
      losses.balance(*losses.balance_terms(logits, plan, valid, "all")),
      losses.z(logits, valid),
      losses.importance(logits, valid),
      losses.load(logits, logits, valid, 2, 0.5),
    ]
  )


def test_padding_counts_in_none():
  # Catches a mean over all rows, padding's (log E)^2 in the z-loss, and padding in f or P.
  logits = jax.random.normal(jax.random.key(0), (S, E))
  padded = jnp.concatenate([logits, 7.0 * jnp.ones((5, E))])
  np.testing.assert_allclose(
    _all_losses(padded, jnp.arange(S + 5) < S), _all_losses(logits, None), rtol=1e-5
  )


def test_all_padding_is_zero_and_finite():
  # Catches 0/0 in a group without a real token, in the value or in the gradient.
  logits, nobody = jax.random.normal(jax.random.key(0), (S, E)), jnp.zeros(S, bool)
  assert not np.any(_all_losses(logits, nobody))
  assert np.all(np.isfinite(jax.jit(jax.jacrev(_all_losses))(logits, nobody)))


def test_losses_are_float32():
  # Catches losses that are summed in the model's bfloat16.
  assert _all_losses(BALANCED.astype(jnp.bfloat16), None).dtype == jnp.float32


def test_over_groups_weighs_by_real_tokens():
  # Three real tokens with 1.0 and one with 5.0 have the mean 2.0, independent of padding. Catches a
  # mean over groups without weights (3.0).
  valid = jnp.array([[True, True, True], [True, False, False]])
  assert float(losses.over_groups(jnp.array([1.0, 5.0]), valid)) == 2.0
  assert float(losses.over_groups(jnp.array([1.0, 5.0]), None)) == 3.0
  # The groups contribute to a mean over 12 tokens. Catches the number of tokens of these groups as
  # the denominator.
  part = losses.over_groups(jnp.array([1.0, 5.0]), valid, jnp.asarray(12.0))
  assert float(part) == pytest.approx(2.0 * float(jnp.sum(valid)) / 12)
  logits = jax.random.normal(jax.random.key(0), (2, 3, E))
  z = losses.over_groups(jax.vmap(losses.z)(logits, valid), valid)
  assert float(z) == pytest.approx(
    float(losses.z(logits.reshape(6, E), valid.reshape(6))), rel=1e-6
  )


def test_the_variation_of_tiny_values():
  # The values are 0.5 and 1.5 times their mean. A common factor changes nothing, so that the
  # gradient is orthogonal to them. Catches squares that underflow in float32, and a mean without a
  # gradient.
  tiny = jnp.array([1e-25, 3e-25])
  assert float(losses.squared_variation(tiny)) == pytest.approx(0.25, rel=1e-5)
  small = jnp.array([0.1, 0.3])
  gradient = jax.grad(losses.squared_variation)(small)
  assert float(gradient @ small) == pytest.approx(0.0, abs=1e-6) and float(gradient[1]) > 0.1


def test_similarity_by_hand():
  # R^T R is [[2, 1], [1, 2]] for the columns (1, 1, 0) and (0, 1, 1), which differs from I by 1 in
  # each of four entries. Catches R R^T, which is 3 x 3, and a mean in place of the sum.
  matrix = jnp.asarray([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
  assert float(losses.similarity(matrix)) == 4.0
  assert float(losses.similarity(jnp.eye(5, 3))) == 0.0
  # A column that is too short grows, and equal columns turn away from each other.
  slope = jax.grad(losses.similarity)(jnp.asarray([[0.5, 0.5], [0.1, 0.0]]))
  assert slope[0, 0] < 0 < slope[1, 0] or slope[1, 0] < 0
