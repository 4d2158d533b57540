"""Tests the networks of Jacobs et al. (1991): their sizes, outputs and gradients, by NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_jax.models.mixture import AdaptiveMixture, BackPropagation, blend, distribution
from moe_jax.routing import mixture_errors

pytestmark = pytest.mark.numerics

X = jnp.asarray(np.random.default_rng(0).normal(size=(7, 2)), jnp.float32)
ONE = np.concatenate([X, np.ones((7, 1))], axis=1)
TARGET = (X[:, :1] > X[:, 1:]).astype(jnp.float32)
MIXTURE = AdaptiveMixture(3, 1, gate_scale=1.0)


def sigmoid(z):
  return 1 / (1 + np.exp(-z))


def params(network):
  return nn.unbox(jax.jit(network.init)(jax.random.key(1), X)["params"])


@pytest.mark.parametrize(
  "network, units, softmax, logistic",
  [
    (AdaptiveMixture, 4, 60, 24),
    (AdaptiveMixture, 8, 120, 48),
    (BackPropagation, 6, 46, 25),
    (BackPropagation, 12, 88, 49),
  ],
)
def test_parameters(network, units, softmax, logistic):
  # Catches a missing bias, a gate with one column less, and a second layer.
  for outputs, expected in ((4, softmax), (1, logistic)):
    shapes = jax.eval_shape(network(units, outputs).init, jax.random.key(0), X)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected


def _by_hand(weights):
  """Returns the gate p and the outputs o of MIXTURE, both [N, E], in float64."""
  router, experts = (np.asarray(weights[name], np.float64) for name in ("router", "experts"))
  gate = np.exp(ONE @ router)
  return gate / gate.sum(-1, keepdims=True), sigmoid(ONE @ experts[..., 0].T)


def test_gate_and_experts():
  # Catches gates whose axes of cases and experts are mixed up, a softmax over cases, and a gate
  # without bias.
  weights = params(MIXTURE)
  gate, outputs = jax.jit(MIXTURE.apply)({"params": weights}, X)
  expected = _by_hand(weights)
  np.testing.assert_allclose(gate, expected[0], rtol=1e-5)
  np.testing.assert_allclose(outputs[..., 0], expected[1], rtol=1e-5)
  np.testing.assert_allclose(
    blend(gate, outputs)[:, 0], (expected[0] * expected[1]).sum(-1), rtol=1e-5
  )


def _posterior(p, o):
  joint = p * np.exp(-0.5 * (TARGET - o) ** 2)
  return joint / joint.sum(-1, keepdims=True)


# The gradients of each error with respect to o_i, by case and expert.
WEIGHTINGS = {
  "cooperative": lambda p, o: -2 * p * (TARGET - (p * o).sum(-1, keepdims=True)),
  "expected": lambda p, o: -2 * p * (TARGET - o),  # Eq. 1.4
  "competitive": lambda p, o: -_posterior(p, o) * (TARGET - o),  # Eq. 1.5
}


def _gradient(error, weights):
  def total(w):
    return jnp.sum(getattr(mixture_errors, error)(*MIXTURE.apply({"params": w}, X), TARGET))

  return jax.jit(jax.grad(total))(weights)


@pytest.mark.parametrize("error", WEIGHTINGS)
def test_experts_move_by_the_papers_weighting(error):
  # By the chain rule, dE/dw = weighting * o (1 - o) * x. Catches the prior instead of the
  # posterior, experts that share a gradient, a stopped gradient, and gates that are paired with the
  # wrong experts.
  weights = params(MIXTURE)
  p, o = _by_hand(weights)
  expected = (WEIGHTINGS[error](p, o) * o * (1 - o)).T @ ONE
  np.testing.assert_allclose(
    _gradient(error, weights)["experts"][..., 0], expected, rtol=1e-4, atol=1e-6
  )


def test_the_gate_moves_from_prior_to_posterior():
  # With the competitive error, dE/dx_j = p_j - h_j, where h is the posterior. Catches a gate
  # without gradient.
  weights = params(MIXTURE)
  p, o = _by_hand(weights)
  expected = ONE.T @ (p - _posterior(p, o))
  np.testing.assert_allclose(
    _gradient("competitive", weights)["router"], expected, rtol=1e-4, atol=1e-6
  )


def test_the_gate_begins_unbiased_and_the_experts_apart():
  # Catches experts that begin with the same weights, which no error would ever separate, and a gate
  # that begins with preferences.
  network = AdaptiveMixture(4, 4)
  gate, outputs = network.apply({"params": params(network)}, X)
  np.testing.assert_allclose(gate, 0.25)
  assert np.all(np.ptp(np.asarray(outputs), axis=1) > 0)


def test_back_propagation():
  # Catches a hidden layer without nonlinearity or bias, and an output that is not a probability.
  network = BackPropagation(5, 1)
  weights = params(network)
  gate, outputs = network.apply({"params": weights}, X)
  hidden = sigmoid(ONE @ np.asarray(weights["hidden"]))
  expected = sigmoid(
    np.concatenate([hidden, np.ones((7, 1))], axis=1) @ np.asarray(weights["output"])
  )
  np.testing.assert_allclose(outputs[:, 0], expected, rtol=1e-5)
  np.testing.assert_array_equal(gate, np.ones((7, 1)))


def test_distribution():
  # Catches a softmax over one unit, which is always 1.
  np.testing.assert_allclose(
    distribution(jnp.array([[0.0], [np.log(3.0)]])), [[0.5], [0.75]], rtol=1e-6
  )
  np.testing.assert_allclose(
    distribution(jnp.log(jnp.array([[1.0, 3.0]]))), [[0.25, 0.75]], rtol=1e-6
  )
