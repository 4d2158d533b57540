"""Tests the values, gradients and numerical range of the errors of a mixture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal

from moe_jax.routing import mixture_errors

pytestmark = pytest.mark.numerics

CASES, EXPERTS, WIDTH = 5, 3, 2


def _case():
  rng = np.random.default_rng(0)
  weights = rng.random((CASES, EXPERTS))
  return (
    weights / weights.sum(-1, keepdims=True),
    rng.normal(size=(CASES, EXPERTS, WIDTH)),
    rng.normal(size=(CASES, WIDTH)),
  )


def _call(name, gate, outputs, target):
  return getattr(mixture_errors, name)(
    *(jnp.asarray(x, jnp.float32) for x in (gate, outputs, target))
  )


def _h(gate, outputs, target):
  likelihood = gate * np.exp(-0.5 * ((target[:, None] - outputs) ** 2).sum(-1))
  return likelihood / likelihood.sum(-1, keepdims=True)


def test_by_hand():
  # One case without a batch axis has p = (1/4, 3/4), o = (0, 2) and d = 1. The blend is 1.5 and its
  # error is 0.25. Both distances are 1, so the expected error is 1, the competitive error is -log
  # exp(-1/2) = 0.5, and the posterior equals the prior. Catches Eq. 1.1 mistaken for Eq. 1.2, and a
  # factor of 2 or a missing 1/2 in the exponent.
  case = ([0.25, 0.75], [[0.0], [2.0]], [1.0])
  assert float(_call("cooperative", *case)) == pytest.approx(0.25)
  assert float(_call("expected", *case)) == pytest.approx(1.0)
  assert float(_call("competitive", *case)) == pytest.approx(0.5)
  np.testing.assert_allclose(_call("posterior", *case), [0.25, 0.75], rtol=1e-6)


GRADIENTS = {
  "cooperative": lambda p, o, d: -2 * p[..., None] * (d - (p[..., None] * o).sum(1))[:, None],
  "expected": lambda p, o, d: -2 * p[..., None] * (d[:, None] - o),  # Eq. 1.4
  "competitive": lambda p, o, d: -_h(p, o, d)[..., None] * (d[:, None] - o),  # Eq. 1.5
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_the_papers(name):
  # Catches the prior instead of the posterior, means over cases or width, and a stopped gradient.
  gate, outputs, target = _case()
  gradient = jax.jit(jax.grad(lambda o: jnp.sum(_call(name, gate, o, target))))(
    jnp.asarray(outputs, jnp.float32)
  )
  np.testing.assert_allclose(gradient, GRADIENTS[name](gate, outputs, target), rtol=1e-4, atol=1e-6)


def test_posterior():
  # Catches a posterior without the prior, or with the wrong sign of the distance.
  case = _case()
  np.testing.assert_allclose(_call("posterior", *case), _h(*case), rtol=1e-5)


def test_competitive_is_the_likelihood_of_a_gaussian_mixture():
  # The error is -log of the density of sum_i p_i N(o_i, I) without D/2 log(2 pi). Catches a
  # different variance, and a sum of logarithms.
  gate, outputs, target = _case()
  density = [
    sum(p * multivariate_normal.pdf(d, mean=o) for p, o in zip(ps, os, strict=True))
    for ps, os, d in zip(gate, outputs, target, strict=True)
  ]
  expected = -np.log(density) - WIDTH / 2 * np.log(2 * np.pi)
  np.testing.assert_allclose(_call("competitive", gate, outputs, target), expected, rtol=1e-5)


def test_best_expert_learns_fastest_only_under_the_competitive_error():
  # Experts 0 and 1 return 0.1 and 5, the target is 0, and the gates are equal. This is the paper's
  # argument for Eq. 1.3. Catches Eq. 1.3 with the gradient of Eq. 1.2.
  def size(name):
    return np.abs(jax.grad(lambda o: _call(name, [0.5, 0.5], o, [0.0]))(jnp.array([[0.1], [5.0]])))[
      :, 0
    ]

  assert (
    size("competitive")[0] > 100 * size("competitive")[1]
    and size("expected")[0] < size("expected")[1]
  )


@pytest.mark.parametrize("gate", [[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]])
def test_finite_far_from_every_expert(gate):
  # exp(-1/2 1000^2) is 0 in floating point. The error is 1000^2 / 2 - log p for the nearer of the
  # experts whose gate is not 0. Catches the logarithm of a sum that underflows (which is infinite),
  # and log 0 of a gate (whose gradient is NaN).
  outputs = jnp.array([[1000.0], [-2000.0]])
  nearer = 0 if gate[0] else 1
  expected = np.float32(outputs[nearer, 0]) ** 2 / 2 - np.log(gate[nearer])
  assert float(_call("competitive", gate, outputs, [0.0])) == pytest.approx(expected, rel=1e-6)
  np.testing.assert_array_equal(_call("posterior", gate, outputs, [0.0]), np.eye(2)[nearer])
  both = jax.grad(lambda p, o: _call("competitive", p, o, [0.0]), argnums=(0, 1))(
    jnp.asarray(gate), outputs
  )
  assert all(np.all(np.isfinite(g)) for g in both)
  np.testing.assert_array_equal(both[1], np.eye(2)[nearer][:, None] * np.asarray(outputs))


def test_errors_are_float32():
  # Catches squares that are summed in the model's bfloat16.
  case = [jnp.ones(shape, jnp.bfloat16) for shape in ((EXPERTS,), (EXPERTS, WIDTH), (WIDTH,))]
  assert {getattr(mixture_errors, name)(*case).dtype for name in (*GRADIENTS, "posterior")} == {
    jnp.dtype("float32")
  }
