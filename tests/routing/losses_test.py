"""Auxiliary losses: their values at balance and at collapse, and that padding does not touch them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import RoutingContext, losses, top_k

pytestmark = pytest.mark.unit

S, E = 12, 4


def _plan(logits, k=2, valid=None):
  return top_k(logits, RoutingContext(valid=valid), k=k)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _balance(logits, k, counts):
  return losses.balance(*losses.balance_terms(logits, _plan(logits, k), None, counts))


# Token t puts a margin on experts t, t+1, ... (mod E): every expert is first, second, ... choice equally often.
BALANCED = jnp.asarray([np.roll([3.0, 2.0, 1.0, 0.0], t) for t in range(S)], jnp.float32)
COLLAPSED = jnp.asarray([[100.0, 0.0, -1.0, -2.0]] * S, jnp.float32)


@pytest.mark.parametrize("counts", ["top_1", "all"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_balance_is_one_at_balance(k, counts):
  # Catches: counting all K choices without dividing by K (flaxformer's and Hugging Face's K), LEV's 1/K, a missing E.
  assert _balance(BALANCED, k, counts) == pytest.approx(1.0, rel=1e-6)


def test_balance_at_collapse():
  # Catches: a missing E, f or P normalised over tokens. "all" at K = 2: f = 1/2 on experts 0 and 1, P = 1 on 0: E/2.
  assert _balance(COLLAPSED, 1, "top_1") == pytest.approx(E)
  assert _balance(COLLAPSED, 1, "all") == pytest.approx(E)
  assert _balance(COLLAPSED, 2, "top_1") == pytest.approx(E)
  assert _balance(COLLAPSED, 2, "all") == pytest.approx(E / 2)


def test_balance_by_hand():
  # Two tokens with p = (0.9, 0.1) and (0.6, 0.4), first choices (0, 0): f = (1, 0), P = (0.75, 0.25): 2 * 0.75 = 1.5.
  # All choices at K = 2: f = (1/2, 1/2): 2 * 0.5 = 1.
  logits = jnp.log(jnp.array([[0.9, 0.1], [0.6, 0.4]]))
  assert _balance(logits, 2, "top_1") == pytest.approx(1.5)
  assert _balance(logits, 2, "all") == pytest.approx(1.0)


def test_balance_pushes_towards_balance_through_p_only():
  # d/dlogits = E/S * f (dP): raising the overloaded expert's logit must raise the loss. Catches: a stop_gradient on P.
  logits = COLLAPSED / 100.0
  gradient = jax.jit(jax.grad(lambda l: _balance(l, 2, "top_1")))(logits)
  assert np.all(np.asarray(gradient)[:, 0] > 0) and np.all(np.asarray(gradient)[:, 1:] < 0)


def test_unknown_counts():
  with pytest.raises(ValueError, match="counts"):
    losses.balance_terms(BALANCED, _plan(BALANCED), None, "top_2")


def test_z_of_zero_logits():
  # Catches: log Z not squared, a sum over tokens, log base 2.
  assert float(losses.z(jnp.zeros((S, E)), None)) == pytest.approx(math.log(E) ** 2)
  # log(e^1 + e^1) = 1 + ln 2.
  assert float(losses.z(jnp.ones((3, 2)), None)) == pytest.approx((1 + math.log(2)) ** 2)


def test_importance():
  # Catches: the unbiased variance (collapse would be E), CV not squared.
  assert float(losses.importance(BALANCED, None)) == pytest.approx(0.0, abs=1e-9)
  assert float(losses.importance(COLLAPSED, None)) == pytest.approx(E - 1)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_load_at_balance_and_collapse(k):
  # Catches: an off-by-one in kth_excluding (collapse would be E/(K+1) - 1), K = E asking top_k for E + 1.
  assert float(losses.load(BALANCED, BALANCED, None, k, 0.1)) == pytest.approx(0.0, abs=1e-6)
  collapsed = jnp.asarray([100.0 * np.arange(E, 0, -1.0)] * S, jnp.float32)
  assert float(losses.load(collapsed, collapsed, None, k, 0.1)) == pytest.approx(E / k - 1)


def test_load_by_hand():
  # One token, x = (1, 0, -1), H = (1, 2, -1), K = 1, sigma = 1. Leaving i out, the largest H is 2, 1, 2:
  # P = Phi(1 - 2), Phi(0 - 1), Phi(-1 - 2) = 0.15866, 0.15866, 0.00135.
  p = np.array([0.1586553, 0.1586553, 0.0013499])
  actual = losses.load(jnp.array([[1.0, 0.0, -1.0]]), jnp.array([[1.0, 2.0, -1.0]]), None, 1, 1.0)
  assert float(actual) == pytest.approx(p.var() / p.mean() ** 2, rel=1e-4)


def test_load_has_a_gradient():
  # Catches: a load loss of integer counts, whose gradient is zero.
  gradient = jax.jit(jax.grad(lambda l: losses.load(l, l, None, 1, 1.0)))(COLLAPSED / 100.0)
  assert np.all(np.isfinite(gradient)) and np.abs(gradient).max() > 1e-4


@jax.jit
def _all_losses(logits, valid):
  plan = _plan(logits, 2, valid)
  return jnp.stack([losses.balance(*losses.balance_terms(logits, plan, valid, "top_1")),
                    losses.balance(*losses.balance_terms(logits, plan, valid, "all")),
                    losses.z(logits, valid), losses.importance(logits, valid),
                    losses.load(logits, logits, valid, 2, 0.5)])


def test_padding_counts_in_none():
  # Catches: a mean over all rows, padding's (log E)^2 in the z-loss, padding among f or P.
  logits = jax.random.normal(jax.random.key(0), (S, E))
  padded = jnp.concatenate([logits, 7.0 * jnp.ones((5, E))])
  np.testing.assert_allclose(_all_losses(padded, jnp.arange(S + 5) < S), _all_losses(logits, None), rtol=1e-5)


def test_all_padding_is_zero_and_finite():
  # Catches: 0/0 in a group without a real token, in value or gradient.
  logits, nobody = jax.random.normal(jax.random.key(0), (S, E)), jnp.zeros(S, bool)
  assert not np.any(_all_losses(logits, nobody))
  assert np.all(np.isfinite(jax.jit(jax.jacrev(_all_losses))(logits, nobody)))


def test_losses_are_float32():
  # Catches: losses summed in the model's bfloat16.
  assert _all_losses(BALANCED.astype(jnp.bfloat16), None).dtype == jnp.float32


def test_over_groups_weighs_by_real_tokens():
  # Three real tokens with 1.0 and one with 5.0: mean 2.0, whatever the padding. Catches: a plain mean (3.0).
  valid = jnp.array([[True, True, True], [True, False, False]])
  assert float(losses.over_groups(jnp.array([1.0, 5.0]), valid)) == 2.0
  assert float(losses.over_groups(jnp.array([1.0, 5.0]), None)) == 3.0
  logits = jax.random.normal(jax.random.key(0), (2, 3, E))
  z = losses.over_groups(jax.vmap(losses.z)(logits, valid), valid)
  assert float(z) == pytest.approx(float(losses.z(logits.reshape(6, E), valid.reshape(6))), rel=1e-6)
