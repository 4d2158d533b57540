"""Causal self-attention within documents: rotary positions, grouped queries, float32 softmax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe_jax.layers.aux import LayerContext
from moe_jax.layers.init import projection
from moe_jax.sharding import constrain

MASKED = -0.7 * jnp.finfo(jnp.float32).max  # finite: a row that is masked everywhere gives numbers, not NaN


def rope(x: Float[Array, "B L H P"], positions: Int[Array, "B L"], theta: float) -> Float[Array, "B L H P"]:
  """Rotary position embedding (Su et al. 2021): rotates feature pairs (i, i + P/2) by position * theta^(-2i/P).

  The product of a rotated query and a rotated key depends on the positions' difference alone. Float32 inside.
  """
  half = x.shape[-1] // 2
  frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = positions[:, :, None, None].astype(jnp.float32) * frequency  # [B, L, 1, P/2]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Attention(nn.Module):
  """Grouped-query attention (Ainslie et al. 2023): query head h reads key-value head h // (heads / kv_heads).

  Attributes:
    num_heads: query heads; a multiple of num_kv_heads.
    num_kv_heads: key-value heads; num_heads is the full attention of Vaswani et al. 2017.
    head_dim: P, even.
    rope_theta: longest wavelength of the rotary embedding, in units of 2 pi tokens.
    output_scale: factor on the initial output projection.
    dtype: of the activations; parameters are float32.
  """

  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope_theta: float = 10_000.0
  output_scale: float = 1.0
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "B L D"], context: LayerContext) -> Float[Array, "B L D"]:
    width, per_kv = x.shape[-1], self.num_heads // self.num_kv_heads
    heads = lambda name, count, axis: jnp.einsum("bld,dhp->blhp", x, projection(
        self, name, (width, count, self.head_dim), ("embed", axis, "head_dim"), fan_in=width, dtype=self.dtype))
    q = rope(heads("query", self.num_heads, "heads"), context.positions, self.rope_theta)
    k = rope(heads("key", self.num_kv_heads, "kv_heads"), context.positions, self.rope_theta)
    v = heads("value", self.num_kv_heads, "kv_heads")
    q, k, v = (constrain(t, "batch", "length", "act_heads", "head_dim") for t in (q, k, v))
    q = q.reshape(*q.shape[:2], self.num_kv_heads, per_kv, self.head_dim) * self.head_dim ** -0.5
    scores = jnp.einsum("bqhgp,bkhp->bhgqk", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(visible(context.segment_ids)[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
    mixed = jnp.einsum("bhgqk,bkhp->bqhgp", weights, v).reshape(*x.shape[:2], self.num_heads, self.head_dim)
    output = projection(self, "output", (self.num_heads, self.head_dim, width), ("heads", "head_dim", "embed"),
                        fan_in=self.num_heads * self.head_dim, scale=self.output_scale, dtype=self.dtype)
    return constrain(jnp.einsum("blhp,hpd->bld", mixed, output), "batch", "length", "act_embed")


def visible(segment_ids: Int[Array, "B L"]) -> jax.Array:
  """[B, L, L]: query q sees key k if k is not later and of the same document. Padding sees earlier padding."""
  length = segment_ids.shape[1]
  causal = jnp.arange(length)[:, None] >= jnp.arange(length)
  return causal & (segment_ids[:, :, None] == segment_ids[:, None, :])
