"""Tests the norms by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers.norms import NORMS

pytestmark = pytest.mark.unit

X = jnp.asarray([[3.0, 4.0, 0.0, 0.0]])


SCALED = [name for name in NORMS if name != "rmsnorm_unscaled"]


@pytest.mark.parametrize(
  "name, expected",
  [
    # The RMS is sqrt(25 / 4) = 2.5.
    ("rmsnorm", [1.2, 1.6, 0.0, 0.0]),
    # The mean is 1.75, the deviations are 1.25, 2.25, -1.75 and -1.75, and the variance is
    # (1.5625 + 5.0625 + 2 * 3.0625) / 4 = 3.1875.
    ("layernorm", [0.7001, 1.2603, -0.9802, -0.9802]),
  ],
)
def test_by_hand(name, expected):
  # Catches a sum instead of a mean, a mean that is not subtracted, and a scale that does not
  # multiply.
  norm = NORMS[name]()
  y = norm.apply({"params": {"scale": jnp.full(4, 2.0)}}, X)
  np.testing.assert_allclose(y[0], 2 * np.asarray(expected), atol=1e-3)


def test_without_parameters_by_hand():
  # Catches a learned scale, whatever its name.
  norm = NORMS["rmsnorm_unscaled"]()
  assert not norm.init(jax.random.key(0), X)
  np.testing.assert_allclose(norm.apply({}, 3 * X)[0], [1.2, 1.6, 0.0, 0.0], atol=1e-3)


@pytest.mark.parametrize("name", NORMS)
def test_epsilon_by_hand(name):
  # The mean is 0, the mean square 0.01 and epsilon 0.03, so the result is x / sqrt(0.04). Catches
  # an epsilon that is not read, or that is added to the root or to a sum of squares.
  x = jnp.asarray([[0.1, -0.1, 0.1, -0.1]])
  variables = {"params": {"scale": jnp.ones(4)}} if name in SCALED else {}
  np.testing.assert_allclose(NORMS[name](epsilon=0.03).apply(variables, x), x / 0.2, rtol=1e-6)
  np.testing.assert_allclose(NORMS[name]().apply(variables, x), x / np.sqrt(0.010001), rtol=1e-6)


@pytest.mark.parametrize("name", NORMS)
def test_bfloat16_in_bfloat16_out_float32_inside(name):
  # Catches squares in bfloat16, and a scale that promotes the residual stream to float32.
  x = jax.random.normal(jax.random.key(0), (4, 512), jnp.bfloat16) * 100
  variables = {"params": {"scale": jnp.ones(512)}} if name in SCALED else {}
  y = NORMS[name]().apply(variables, x)
  exact = NORMS[name]().apply(variables, x.astype(jnp.float32))
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))
