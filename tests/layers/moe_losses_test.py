"""Tests the auxiliary losses of a layer, over groups and over microbatches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moe_jax.layers import LOSSES, RouterFacts
from moe_jax.layers.moe_losses import auxiliary_losses, global_shares
from moe_jax.routing import RoutingContext
from moe_jax.routing.top_k import top_k

pytestmark = pytest.mark.numerics

L, E = 6, 4


def _plan(logits, k=1):
  return jax.vmap(lambda l: top_k(l, RoutingContext(), k=k, gate_norm="none"))(logits)


def test_balance_over_groups_and_over_all():
  # Two groups collapse on different experts. The balance loss of each is E, but it is E/2 if f and
  # P are averaged first, because then f = P = 1/2 for two experts. Each group uses one of 2 devices
  # (a loss of 2), and together they use both (a loss of 1). Catches "global" that averages
  # products.
  logits = jnp.zeros((2, L, E)).at[0, :, 0].set(50.0).at[1, :, 2].set(50.0)
  context = RoutingContext(valid=jnp.ones((2, L), bool))

  def value(name, **o):
    return float(
      tiny.quick_jit(
        lambda logits: auxiliary_losses(
          tiny.loss_options(name, **o), RouterFacts(), logits, _plan(logits), context
        )[name]
      )(logits)
    )

  assert value("balance", balance_over="group") == pytest.approx(E)
  assert value("balance", balance_over="global") == pytest.approx(E / 2)
  assert value("device", devices=2, balance_over="group") == pytest.approx(2)
  assert value("device", devices=2, balance_over="global") == pytest.approx(1)
  assert value("communication", devices=2, balance_over="group") == pytest.approx(2)
  assert value("communication", devices=2, balance_over="global") == pytest.approx(1)
  assert value("z") == pytest.approx(2500, rel=1e-3)
  assert value("importance") == pytest.approx(E - 1, rel=1e-3)
  assert value("importance", importance_of="gates") == pytest.approx(E - 1, rel=1e-3)
  assert value("load") == pytest.approx(E - 1, rel=1e-3)


FACTS = RouterFacts(matrix=jnp.eye(3, E) / 2)


def test_groups_weigh_as_many_tokens_as_they_have():
  # A group that is only padding must not pull a mean towards 0. Catches a plain mean over groups.
  logits = jax.random.normal(jax.random.key(0), (2, L, E))
  names = tuple(name for name in LOSSES if name != "threshold")
  run = tiny.quick_jit(
    lambda logits, valid: auxiliary_losses(
      tiny.loss_options(*names, devices=2),
      FACTS,
      logits,
      jax.vmap(lambda l, v: top_k(l, RoutingContext(valid=v), k=2))(logits, valid),
      RoutingContext(valid=valid),
    )
  )
  half = run(logits, jnp.asarray([[True] * L, [False] * L]))
  alone = run(logits[:1], jnp.ones((1, L), bool))
  for name in names:
    np.testing.assert_allclose(half[name], alone[name], rtol=1e-5, err_msg=name)


def test_threshold_trains_thresholds_only():
  # Catches a threshold loss that trains the router, or that does not reach the thresholds.
  logits = jax.random.normal(jax.random.key(0), (1, 8, E))

  def f(logits, threshold):
    return auxiliary_losses(
      tiny.loss_options("threshold"),
      RouterFacts(k=2),
      logits,
      _plan(logits),
      RoutingContext(valid=jnp.ones((1, 8), bool), threshold=threshold),
    )["threshold"]

  d_logits, d_threshold = tiny.quick_jit(jax.grad(f, argnums=(0, 1)))(logits, jnp.zeros(E))
  assert not np.any(d_logits) and np.all(np.abs(d_threshold) > 0)


def test_losses_and_gradients_of_parts_add_up():
  # Each part has one group, and the two groups differ in padding. Catches f of the part, in the
  # value or the gradient, the part's own number of tokens, and f of one loss that is given to
  # another.
  logits, valid = (
    3 * jax.random.normal(jax.random.key(0), (2, L, E)),
    jnp.arange(L) < jnp.array([[5], [2]]),
  )
  names = tuple(name for name in LOSSES if name != "threshold")
  options, tokens = (
    tiny.loss_options(*names, balance_over="global", balance_counts="all", devices=2),
    jnp.asarray(7.0),
  )
  weights = dict(zip(names, 2.0 ** np.arange(len(names)), strict=True))

  def loss_inputs(logits, part):
    context = RoutingContext(valid=valid[part])
    return (
      logits,
      jax.vmap(lambda l, v: top_k(l, RoutingContext(valid=v), k=2))(logits, valid[part]),
      context,
    )

  def loss(logits, part, *whole):
    by_name = auxiliary_losses(options, FACTS, *loss_inputs(logits, part), *whole)
    return sum(weights[name] * value for name, value in by_name.items()), by_name

  @tiny.quick_jit
  def slopes(logits):
    parts, slope = (slice(0, 1), slice(1, 2)), jax.grad(loss, has_aux=True)
    shares = [
      global_shares(options, RouterFacts(), *loss_inputs(logits[part], part), tokens)
      for part in parts
    ]
    shares = jax.tree.map(jnp.add, *shares)
    assert shares.keys() == {"balance", "device", "communication", "sparsity"}
    return slope(logits, slice(0, 2)), *(
      slope(logits[part], part, tokens, shares) for part in parts
    )

  (expected, values), (one, first), (two, second) = slopes(logits)
  np.testing.assert_allclose(jnp.concatenate([one, two]), expected, rtol=1e-5, atol=1e-6)
  for name in names:
    np.testing.assert_allclose(first[name] + second[name], values[name], rtol=1e-6, err_msg=name)
