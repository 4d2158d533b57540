"""Tests routers and losses with logits far from 0.

Routers must choose as if probabilities did not underflow, and gradients must stay finite.
"""

import functools
import itertools

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


def routed_by(name, logits, context, **options):
  """Returns the plan of a router that is compiled as one program.

  Operation by operation, it would take longer to compile than to run.
  """
  return jax.jit(lambda logits, context: ROUTERS[name].route(logits, context, **options))(
    logits, context
  )


def chosen(plan, token=0):
  """Returns the experts of a token in order."""
  return [
    int(e)
    for t, e in zip(plan.token, plan.expert, strict=True)
    if t == token and e < plan.num_experts
  ]


@pytest.mark.parametrize(
  "name, options, context",
  [
    ("top_k", {"k": 2}, RoutingContext()),
    ("top_k", {"k": 2, "gate_norm": "none"}, BIASED),
    ("noisy_top_k", {"k": 2}, RoutingContext()),
    ("noisy_top_k", {"k": 2}, BIASED),
    ("gshard", {"second_policy": "all"}, TRAINS),
    ("st_moe", {"k": 2, "policy": "all"}, TRAINS),
    ("device_limited", {"k": 2, "groups": 1, "kept_groups": 1}, RoutingContext()),
    ("device_limited", {"k": 2, "groups": 2, "kept_groups": 2}, BIASED),
    ("sigmoid_bias", {"k": 2}, RoutingContext()),
    ("sigmoid_bias", {"k": 2}, BIASED),
    ("sinkhorn", {"k": 2}, RoutingContext()),
  ],
)
def test_the_second_choice_is_the_second_logit(name, options, context):
  # Catches a choice by probabilities, all of which except for the first are 0 in float32, and by
  # sigmoids, which are all 1 or all 0.
  run = jax.jit(lambda logits: ROUTERS[name].route(logits, context, **options))
  for logits in (
    [200.0, 0.0, 50.0, 60.0],
    [-200.0, -900.0, -400.0, -300.0],
    [200.0, 0.0, -150.0, 80.0],
  ):
    assert chosen(run(np.array([logits], np.float32))) == [0, 3], logits


def test_device_groups_are_ranked_without_underflow():
  # Catches groups that are ranked by probabilities, or by sums of sigmoids, that underflow.
  logits = jnp.array([[0.0, -900.0, -500.0, -500.0, -400.0, -900.0]])
  options = {"k": 2, "groups": 3, "kept_groups": 2}
  assert chosen(routed_by("device_limited", logits, RoutingContext(), **options)) == [0, 4]
  assert chosen(routed_by("sigmoid_bias", logits - 200.0, RoutingContext(), **options)) == [0, 4]


@pytest.mark.parametrize(
  "name, options",
  [
    ("expert_choice", {"capacity_factor": 1.0}),
    ("capped_expert_choice", {"capacity_factor": 1.0, "max_experts": 2}),
    ("strictly_balanced", {"k": 1}),
  ],
)
def test_an_expert_that_nobody_wants_takes_who_wants_it_most(name, options):
  # Catches tokens that are ranked by probabilities that are all 0, so that the first tokens win.
  logits = jnp.array([[0.0, -400.0], [0.0, -300.0], [0.0, -200.0], [0.0, -500.0]])
  plan = routed_by(name, logits, TRAINS, **options)
  taken = [int(t) for t, e in zip(plan.token, plan.expert, strict=True) if e == 1]
  assert taken == [2, 1] or name == "capped_expert_choice" and len(taken) == 2


@pytest.mark.parametrize(
  "name", ["top_k", "st_moe", "noisy_top_k", "device_limited", "sigmoid_bias", "sinkhorn"]
)
def test_priority_tells_very_sure_tokens_apart(name):
  # Catches a priority by probabilities that are all 1 in float32.
  options = {"k": 1, "priority": "gate"} | (
    {"groups": 1, "kept_groups": 1} if name == "device_limited" else {}
  )
  logits = jnp.array([[20.0, 0.0], [40.0, 0.0], [30.0, 0.0]])
  plan = routed_by(name, logits, RoutingContext(), **options)
  assert [int(t) for t in plan.token] == [1, 2, 0]


def routed(name, logits, groups=2):
  """Returns (options, context) with which a router can be called on these logits."""
  tokens, experts = logits.shape
  options = (
    {"k": 2}
    if name in ("noisy_top_k", "strictly_balanced", "sigmoid_bias", "device_limited")
    else {}
  )
  options |= (
    {"groups": groups, "kept_groups": groups} if name in ("sigmoid_bias", "device_limited") else {}
  )
  options |= {"groups": groups, "primary_k": 2, "k": 1} if name == "hierarchical" else {}
  context = RoutingContext(
    key=jax.random.key(0),
    token_ids=jnp.arange(tokens),
    noise_std=jnp.ones(logits.shape),
    train=True,
    primary=logits[:, :groups],
    primary_noise_std=jnp.ones((tokens, groups)),
    threshold=jnp.zeros(experts),
  )
  return options, context


@functools.cache
def slopes_of_gates(name):
  """Returns a compiled function of logits: a weighted sum of a router's gates, and its gradient."""

  def total(logits, context):
    gate = ROUTERS[name].route(logits, context, **routed(name, logits)[0]).gate
    return jnp.sum(gate * jnp.arange(1.0, gate.size + 1))

  # The context is computed outside of the differentiated function, so that no gradient flows
  # through it.
  return jax.jit(lambda logits: jax.value_and_grad(total)(logits, routed(name, logits)[1]))


@pytest.mark.parametrize("shift", [-1e4, -60.0, 60.0, 1e4])
@pytest.mark.parametrize("name", ROUTERS)
def test_gates_and_their_gradients_stay_finite(name, shift):
  # Catches a division by a sum that underflows, in a gate or in its derivative.
  logits = np.random.default_rng(1).normal(size=(8, 4)).astype(np.float32) * 8 + np.float32(shift)
  value, slope = slopes_of_gates(name)(logits)
  assert np.isfinite(value) and np.isfinite(slope).all()


LOSSES = {
  "balance": lambda x, plan: losses.balance(*losses.balance_terms(x, plan, None, "all")),
  "balance of sigmoids": lambda x, plan: losses.balance(
    *losses.balance_terms(x, plan, None, "all", "sigmoid")
  ),
  "balance of roots": lambda x, plan: losses.balance(
    *losses.balance_terms(x, plan, None, "all", "sqrt_softplus")
  ),
  "communication": lambda x, plan: losses.balance(*losses.communication_terms(x, plan, None, 2, 1)),
  "z": lambda x, plan: losses.z(x, None),
  "importance": lambda x, plan: losses.importance(x, None),
  "importance of gates": lambda x, plan: losses.gate_importance(plan),
  "load": lambda x, plan: losses.load(x, x, None, 2, 0.25),
}


@functools.cache
def slopes_of_loss(name, **options):
  """Returns a compiled function from logits to a loss of `sigmoid_bias`'s plan and its gradient."""
  return jax.jit(
    jax.value_and_grad(
      lambda x: LOSSES[name](x, ROUTERS["sigmoid_bias"].route(x, RoutingContext(), k=2, **options))
    )
  )


@pytest.mark.parametrize("shift", [-1e4, -60.0, 0.0, 60.0, 1e4])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_their_gradients_stay_finite(name, shift):
  # Catches a loss that becomes 0 or NaN if all logits are shifted (because of the sum of sigmoids
  # or the square of a mean gate).
  logits = np.random.default_rng(2).normal(size=(16, 4)).astype(np.float32) + np.float32(shift)
  value, slope = slopes_of_loss(name, gate_norm="none")(logits)
  assert np.isfinite(value) and np.isfinite(slope).all()


@pytest.mark.parametrize("shift", [0.0, -60.0, -1000.0])
def test_the_balance_loss_of_sigmoids_knows_no_shift(shift):
  # Catches a division by (sum of sigmoids + 1e-20), with which a router can reach a loss of 0,
  # where the gradient is NaN.
  logits = np.full((64, 8), shift - 60.0, np.float32) + np.float32(8.0) * (np.arange(8) < 2)
  value, slope = slopes_of_loss("balance of sigmoids")(logits)
  np.testing.assert_allclose(value, 4.0, rtol=2e-3)
  assert np.isfinite(slope).all() and np.abs(slope).max() > 1e-6


NOISY = np.random.default_rng(3).normal(size=(16, 8)).astype(np.float32)


@functools.cache
def slopes_of_load(two, noisy):
  """Returns a compiled function that computes a load loss and its gradients.

  Its arguments are the logits and the deviations before the softplus. The experts have two levels
  if `two` is True.
  """

  def load(logits, raw):
    context = RoutingContext(
      key=jax.random.key(4) if noisy else None,
      train=noisy,
      noise_std=jax.nn.softplus(raw),
      primary=jnp.asarray(NOISY[:, :2]),
      primary_noise_std=jax.nn.softplus(raw[:, :2]),
    )
    return (
      two_levels.load(logits, context, groups=2, primary_k=1, k=2)
      if two
      else noisy_top_k.load(logits, context, k=2)
    )

  return jax.jit(jax.value_and_grad(load, argnums=(0, 1)))


@pytest.mark.parametrize("dead", [-20.0, -44.0, -90.0, -1e4])
def test_noise_that_has_died_out_leaves_a_finite_gradient(dead):
  # Catches a gradient that grows with 1/sigma^2.
  raw = np.zeros((16, 8), np.float32)
  raw[3, 2] = dead
  for two, noisy in itertools.product((False, True), repeat=2):
    value, slopes = slopes_of_load(two, noisy)(NOISY, raw)
    assert np.isfinite(value) and all(np.isfinite(slope).all() for slope in slopes)
    assert dead > -44 or abs(slopes[1][3, 2]) < 1e-15  # The limit is 0.


def test_a_floor_of_the_noise_moves_nothing_ordinary():
  # Catches a floor that has an effect although the noise is not near 0.
  logits = jnp.asarray(NOISY)
  ordinary = losses.chosen_probability(logits, logits, 2, 0.3)
  top = np.sort(logits, axis=-1)[:, ::-1]
  kth = np.where(logits >= top[:, 1:2], top[:, 2:3], top[:, 1:2])
  np.testing.assert_allclose(ordinary, jax.scipy.stats.norm.cdf((logits - kth) / 0.3), atol=1e-6)


def test_the_errors_of_1991_stay_finite_far_from_the_target():
  # Catches the logarithm of a sum of likelihoods that all underflow.
  outputs, target = jnp.full((1, 3, 2), 60.0), jnp.zeros((1, 2))
  value, slope = jax.jit(
    jax.value_and_grad(lambda o: jnp.sum(competitive(jnp.full((1, 3), 1 / 3), o, target)))
  )(outputs)
  assert np.isfinite(value) and np.isfinite(slope).all() and np.abs(slope).max() > 1
