"""Normalisation of each token's features, in float32, with results in the dtype of the input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from moe_jax.layers.init import parameter


class RmsNorm(nn.Module):
  """Computes x / sqrt(mean(x^2) + epsilon) * scale (Zhang and Sennrich 2019).

  Attributes:
    epsilon: Keeps the root away from 0. It matters wherever x is small: rows of an embedding of
      standard deviation 0.02 have a mean square of 4e-4, of which 1e-5 is a fortieth.
  """

  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Normalises the last axis."""
    return (_over_rms(x, self.epsilon) * _scale(self, x.shape[-1])).astype(x.dtype)


class UnscaledRmsNorm(nn.Module):
  """Computes x / sqrt(mean(x^2) + epsilon), which is an ablation of ST-MoE (Table 2)."""

  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Normalises the last axis."""
    return _over_rms(x, self.epsilon).astype(x.dtype)


class LayerNorm(nn.Module):
  """Computes (x - mean) / sqrt(variance + epsilon) * scale (Ba et al. 2016).

  Deviation: there is no bias, as in DBRX.
  """

  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Normalises the last axis."""
    y = x.astype(jnp.float32)
    y -= jnp.mean(y, axis=-1, keepdims=True)
    y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
    return (y * _scale(self, x.shape[-1])).astype(x.dtype)


def _over_rms(x: Float[Array, "... D"], epsilon: float) -> Float[Array, "... D"]:
  """Returns x / sqrt(mean(x^2) + epsilon) in float32."""
  y = x.astype(jnp.float32)
  return y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + epsilon)


def _scale(module: nn.Module, width: int) -> Float[Array, "D"]:
  """Returns the parameter `scale` of `module`, which starts as ones."""
  return parameter(module, "scale", nn.initializers.ones, (width,), ("norm",))


NORMS = {"rmsnorm": RmsNorm, "rmsnorm_unscaled": UnscaledRmsNorm, "layernorm": LayerNorm}
