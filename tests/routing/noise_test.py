"""Router noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import noise

pytestmark = pytest.mark.unit


def test_jitter():
  # Catches: additive noise, noise in bfloat16 (steps of 2^-8 near 1), a range of [1, 1 + 2 eps], one factor for all.
  x = 8.0 * jnp.ones((64, 32), jnp.bfloat16)
  ratio = np.asarray(noise.jitter(jax.random.key(0), x, 0.01)) / 8.0
  assert ratio.dtype == np.float32 and len(np.unique(ratio)) > 1000
  assert 0.99 <= ratio.min() < 0.9905 and 1.0095 < ratio.max() <= 1.01
  assert np.all(noise.jitter(jax.random.key(0), x, 0.0) == 8.0)
