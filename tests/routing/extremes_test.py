"""Logits far from 0: routers choose by what probabilities would be if they did not underflow; gradients stay finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import ROUTERS, RoutingContext, losses, noisy_top_k
from moe_jax.routing import hierarchical as two_levels
from moe_jax.routing.mixture_errors import competitive

pytestmark = pytest.mark.numerics
BIASED = RoutingContext(bias=jnp.zeros(4))
TRAINS = RoutingContext(train=True)


def chosen(plan, token=0):
  """The experts of a token, in order."""
  return [int(e) for t, e in zip(plan.token, plan.expert, strict=True) if t == token and e < plan.num_experts]


@pytest.mark.parametrize("name, options, context", [
    ("top_k", {"k": 2}, RoutingContext()), ("top_k", {"k": 2, "gate_norm": "none"}, BIASED),
    ("noisy_top_k", {"k": 2}, RoutingContext()), ("noisy_top_k", {"k": 2}, BIASED),
    ("gshard", {"second_policy": "all"}, TRAINS), ("st_moe", {"k": 2, "policy": "all"}, TRAINS),
    ("device_limited", {"k": 2, "groups": 1, "kept_groups": 1}, RoutingContext()),
    ("device_limited", {"k": 2, "groups": 2, "kept_groups": 2}, BIASED),
    ("sigmoid_bias", {"k": 2}, RoutingContext()), ("sigmoid_bias", {"k": 2}, BIASED),
    ("sinkhorn", {"k": 2}, RoutingContext())])
@pytest.mark.parametrize("logits", [
    [200.0, 0.0, 50.0, 60.0], [-200.0, -900.0, -400.0, -300.0], [200.0, 0.0, -150.0, 80.0]])
def test_the_second_choice_is_the_second_logit(name, options, context, logits):
  # Catches: a choice by probabilities, all of which but the first are 0 in float32; sigmoids that are all 1 or all 0.
  plan = ROUTERS[name](jnp.array([logits]), context, **options)
  assert chosen(plan) == [0, 3]


def test_device_groups_are_ranked_without_underflow():
  # Catches: groups ranked by probabilities, or sums of sigmoids, that have underflowed.
  logits = jnp.array([[0.0, -900.0, -500.0, -500.0, -400.0, -900.0]])
  options = {"k": 2, "groups": 3, "kept_groups": 2}
  assert chosen(ROUTERS["device_limited"](logits, RoutingContext(), **options)) == [0, 4]
  assert chosen(ROUTERS["sigmoid_bias"](logits - 200.0, RoutingContext(), **options)) == [0, 4]


@pytest.mark.parametrize("name, options", [("expert_choice", {"capacity_factor": 1.0}),
                                           ("capped_expert_choice", {"capacity_factor": 1.0, "max_experts": 2}),
                                           ("strictly_balanced", {"k": 1})])
def test_an_expert_that_nobody_wants_takes_who_wants_it_most(name, options):
  # Catches: tokens ranked by probabilities that are all 0, so that the first tokens win.
  logits = jnp.array([[0.0, -400.0], [0.0, -300.0], [0.0, -200.0], [0.0, -500.0]])
  plan = ROUTERS[name](logits, TRAINS, **options)
  taken = [int(t) for t, e in zip(plan.token, plan.expert, strict=True) if e == 1]
  assert taken == [2, 1] or name == "capped_expert_choice" and len(taken) == 2


@pytest.mark.parametrize("name", ["top_k", "st_moe", "noisy_top_k", "device_limited", "sigmoid_bias", "sinkhorn"])
def test_priority_tells_very_sure_tokens_apart(name):
  # Catches: an order of service by probabilities that are all 1 in float32.
  options = {"k": 1, "priority": "gate"} | ({"groups": 1, "kept_groups": 1} if name == "device_limited" else {})
  logits = jnp.array([[20.0, 0.0], [40.0, 0.0], [30.0, 0.0]])
  plan = ROUTERS[name](logits, RoutingContext(), **options)
  assert [int(t) for t in plan.token] == [1, 2, 0]


def routed(name, logits, groups=2):
  """`(options, context)` with which a router can be called on these logits."""
  tokens, experts = logits.shape
  options = {"k": 2} if name in ("noisy_top_k", "strictly_balanced", "sigmoid_bias", "device_limited") else {}
  options |= {"groups": groups, "kept_groups": groups} if name in ("sigmoid_bias", "device_limited") else {}
  options |= {"groups": groups, "primary_k": 2, "k": 1} if name == "hierarchical" else {}
  context = RoutingContext(
      key=jax.random.key(0), token_ids=jnp.arange(tokens), noise_std=jnp.ones(logits.shape), train=True,
      primary=logits[:, :groups], primary_noise_std=jnp.ones((tokens, groups)), threshold=jnp.zeros(experts))
  return options, context


@pytest.mark.parametrize("shift", [-1e4, -60.0, 60.0, 1e4])
@pytest.mark.parametrize("name", ROUTERS)
def test_gates_and_their_gradients_stay_finite(name, shift):
  # Catches: a division by a sum that has underflowed, in a gate or in what it is differentiated to.
  logits = jax.random.normal(jax.random.key(1), (8, 4)) * 8 + shift
  options, context = routed(name, logits)
  weights = jnp.arange(1.0, 400.0)
  gates = lambda x: (lambda plan: jnp.sum(plan.gate * weights[:plan.gate.size]))(ROUTERS[name](x, context, **options))
  value, slope = jax.value_and_grad(gates)(logits)
  assert np.isfinite(value) and np.isfinite(slope).all()


LOSSES = {
    "balance": lambda x, plan: losses.balance(*losses.balance_terms(x, plan, None, "all")),
    "balance of sigmoids": lambda x, plan: losses.balance(*losses.balance_terms(x, plan, None, "all", "sigmoid")),
    "communication": lambda x, plan: losses.balance(*losses.communication_terms(x, plan, None, 2, 1)),
    "z": lambda x, plan: losses.z(x, None),
    "importance": lambda x, plan: losses.importance(x, None),
    "importance of gates": lambda x, plan: losses.gate_importance(plan),
    "load": lambda x, plan: losses.load(x, x, None, 2, 0.25),
}


@pytest.mark.parametrize("shift", [-1e4, -60.0, 0.0, 60.0, 1e4])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_their_gradients_stay_finite(name, shift):
  # Catches: a loss that a shift of all logits drives to 0 or NaN (the sum of sigmoids, the square of a mean gate).
  def loss(x):
    return LOSSES[name](x, ROUTERS["sigmoid_bias"](x, RoutingContext(), k=2, gate_norm="none"))
  logits = jax.random.normal(jax.random.key(2), (16, 4)) + shift
  value, slope = jax.value_and_grad(loss)(logits)
  assert np.isfinite(value) and np.isfinite(slope).all()


@pytest.mark.parametrize("shift", [0.0, -60.0, -1000.0])
def test_the_balance_loss_of_sigmoids_knows_no_shift(shift):
  # Catches: (sum of sigmoids + 1e-20), which a router can drive to a loss of 0, and whose gradient then is NaN.
  logits = jnp.zeros((64, 8)).at[:, :2].add(8.0) - 60.0 + shift
  def loss(x):
    return losses.balance(*losses.balance_terms(x, ROUTERS["sigmoid_bias"](x, RoutingContext(), k=2), None, "all",
                                                "sigmoid"))
  value, slope = jax.value_and_grad(loss)(logits)
  np.testing.assert_allclose(value, 4.0, rtol=2e-3)
  assert np.isfinite(slope).all() and np.abs(slope).max() > 1e-6


@pytest.mark.parametrize("dead", [-20.0, -44.0, -90.0, -1e4])
def test_noise_that_has_died_out_leaves_a_finite_gradient(dead):
  # Catches: a gradient that goes with 1/sigma^2; a floor that moves what ordinary noise gives.
  logits = jax.random.normal(jax.random.key(3), (16, 8))
  raw = jnp.zeros((16, 8)).at[3, 2].set(dead)
  context = lambda raw, key=None: RoutingContext(
      key=key, train=key is not None, noise_std=jax.nn.softplus(raw), primary=logits[:, :2],
      primary_noise_std=jax.nn.softplus(raw[:, :2]))
  for key in (None, jax.random.key(4)):
    for load in (lambda x, raw, key=key: noisy_top_k.load(x, context(raw, key), k=2),
                 lambda x, raw, key=key: two_levels.load(x, context(raw, key), groups=2, primary_k=1, k=2)):
      value, slopes = jax.value_and_grad(load, argnums=(0, 1))(logits, raw)
      assert np.isfinite(value) and all(np.isfinite(slope).all() for slope in slopes)
      assert dead > -44 or abs(slopes[1][3, 2]) < 1e-15  # the limit is 0
  ordinary = losses.chosen_probability(logits, logits, 2, 0.3)
  top = np.sort(logits, axis=-1)[:, ::-1]
  kth = np.where(np.asarray(logits) >= top[:, 1:2], top[:, 2:3], top[:, 1:2])
  np.testing.assert_allclose(ordinary, jax.scipy.stats.norm.cdf((np.asarray(logits) - kth) / 0.3), atol=1e-6)


def test_the_errors_of_1991_stay_finite_far_from_the_target():
  # Catches: the logarithm of a sum of likelihoods that have all underflowed.
  outputs, target = jnp.full((1, 3, 2), 60.0), jnp.zeros((1, 2))
  value, slope = jax.value_and_grad(lambda o: jnp.sum(competitive(jnp.full((1, 3), 1 / 3), o, target)))(outputs)
  assert np.isfinite(value) and np.isfinite(slope).all() and np.abs(slope).max() > 1
