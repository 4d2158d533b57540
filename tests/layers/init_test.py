"""Tests how parameters are created and initialised."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from moe_jax.layers.init import projection

pytestmark = pytest.mark.unit


class One(nn.Module):
  scale: float = 1.0

  @nn.compact
  def __call__(self, dtype):
    return projection(
      self, "w", (256, 400), ("embed", "mlp"), fan_in=256, scale=self.scale, dtype=dtype
    )


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_standard_deviation_is_scale_over_sqrt_fan_in(scale):
  # Catches the uncorrected truncated normal, which is 12 % too narrow, and fan-out instead of
  # fan-in.
  w = nn.unbox(One(scale).init(jax.random.key(0), jnp.float32))["params"]["w"]
  assert abs(float(w.std()) * 16 / scale - 1) < 0.02
  assert float(jnp.abs(w).max()) <= 2.3 * scale / 16


def test_parameters_are_float32_and_named_and_used_in_the_dtype_asked_for():
  # Catches bfloat16 master weights.
  w, variables = One().init_with_output(jax.random.key(0), jnp.bfloat16)
  box = variables["params"]["w"]
  assert (
    w.dtype == jnp.bfloat16 and box.value.dtype == jnp.float32 and box.names == ("embed", "mlp")
  )
