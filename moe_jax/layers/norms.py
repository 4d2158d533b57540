"""Normalisation of each token's features, computed in float32 and returned in the input's dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

EPSILON = 1e-6


class RmsNorm(nn.Module):
  """x / RMS(x) * scale (Zhang and Sennrich 2019)."""

  @nn.compact
  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    return (_over_rms(x) * _scale(self, x.shape[-1])).astype(x.dtype)


class UnscaledRmsNorm(nn.Module):
  """x / RMS(x), without parameters: an ablation of ST-MoE (Table 2)."""

  @nn.compact
  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    return _over_rms(x).astype(x.dtype)


class LayerNorm(nn.Module):
  """(x - mean) / std * scale (Ba et al. 2016). Deviation: no bias."""

  @nn.compact
  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    y = x.astype(jnp.float32)
    y -= jnp.mean(y, axis=-1, keepdims=True)
    y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + EPSILON)
    return (y * _scale(self, x.shape[-1])).astype(x.dtype)


def _over_rms(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
  y = x.astype(jnp.float32)
  return y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + EPSILON)


def _scale(module: nn.Module, width: int) -> Float[Array, "D"]:
  return module.param("scale", nn.with_logical_partitioning(nn.initializers.ones, ("norm",)), (width,), jnp.float32)


NORMS = {"rmsnorm": RmsNorm, "rmsnorm_unscaled": UnscaledRmsNorm, "layernorm": LayerNorm}
