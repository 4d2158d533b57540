"""Tests the scaling of the rotary embedding by values worked by hand."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers.attention import rope
from moe_jax.layers.rope_scaling import RopeOptions, kept_share, mscale

pytestmark = pytest.mark.numerics


def test_llama3_keeps_fast_pairs_and_divides_slow_ones():
  # By hand: pair i turns 100 * 100^(-i/2) times, which is 100, 10, 1 and 0.1 times.
  # Catches bounds that are exchanged, and a share that is linear in the wavelength.
  options = RopeOptions(
    scaling="llama3",
    original_length=round(200 * math.pi),
    low_freq_factor=1.0,
    high_freq_factor=19.0,
    factor=8.0,
  )
  np.testing.assert_allclose(kept_share(4, 10_000.0, options), [1, 0.5, 0, 0], atol=1e-3)


def test_yarn_falls_linearly_over_pairs():
  # By hand: with theta = 10^4 and 8 pairs, pair i turns 1000 * 10^(-i/2) times, so that pair 2
  # turns 100 times and pair 6 once; the share falls from 1 at pair 2 to 0 at pair 6.
  # Catches ends that are exchanged or rounded the other way.
  options = RopeOptions(
    scaling="yarn", original_length=round(2000 * math.pi), beta_fast=99.0, beta_slow=1.01
  )
  shares = kept_share(8, 10_000.0, options)
  np.testing.assert_allclose(shares, [1, 1, 1, 0.75, 0.5, 0.25, 0, 0], atol=1e-3)


def test_linear_is_a_smaller_position():
  # Catches frequencies that are multiplied instead of divided.
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 2, 8)), jnp.float32)
  places = jnp.asarray([[0, 4, 8]])
  scaled = rope(x, places, 100.0, RopeOptions(scaling="linear", factor=4.0))
  np.testing.assert_allclose(scaled, rope(x, places // 4, 100.0), rtol=1e-5)


def test_factors_on_features_and_scores():
  # By hand: 0.1 ln(e^2) + 1 = 1.2, and 1.1^2 with m = 1/2.
  # Catches a factor on the scores that is not squared, and one without YaRN.
  yarn = RopeOptions(scaling="yarn", factor=math.e**2, score_mscale=0.5)
  assert mscale(math.e**2) == pytest.approx(yarn.amplitude) == pytest.approx(1.2)
  assert yarn.score_factor == pytest.approx(1.21)
  x, places = jnp.ones((1, 1, 1, 4)), jnp.zeros((1, 1), jnp.int32)
  np.testing.assert_allclose(rope(x, places, 100.0, yarn), 1.2 * x, rtol=1e-6)
  given = RopeOptions(scaling="yarn", factor=3.0, attention_factor=0.7)
  assert given.amplitude == 0.7 and given.score_factor == 1
  none = RopeOptions(factor=3.0, score_mscale=1.0, attention_factor=0.7)
  assert none.amplitude == none.score_factor == 1
