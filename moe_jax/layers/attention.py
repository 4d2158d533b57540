"""Attention within documents: rotary, relative or no positions, grouped queries, float32
softmax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from moe_jax.layers.aux import LayerContext
from moe_jax.layers.init import projection
from moe_jax.layers.norms import RmsNorm
from moe_jax.layers.relative_bias import bias_table, relative_bias
from moe_jax.options import LARGEST, NOT_NEGATIVE, ROWS, WIDTH, Bounds, Options, option
from moe_jax.sharding import constrain

MASKED = (
  -0.7 * jnp.finfo(jnp.float32).max
)  # finite: a row that is masked everywhere gives numbers, not NaN


def rope(
  x: Float[Array, "B L H P"], positions: Int[Array, "B L"], theta: float
) -> Float[Array, "B L H P"]:
  """Rotary position embedding (Su et al. 2021): rotates feature pairs (i, i + P/2) by position *
  theta^(-2i/P).

  The product of a rotated query and a rotated key depends on the positions' difference alone.
  Float32 inside.
  """
  half = x.shape[-1] // 2
  frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = positions[:, :, None, None].astype(jnp.float32) * frequency  # [B, L, 1, P/2]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class AttentionOptions(Options):
  """The part of the section `model` that describes grouped-query attention."""

  num_heads: Annotated[int, WIDTH] = option(4, "Query heads, H.")
  num_kv_heads: Annotated[int, WIDTH] = option(
    4, "Key-value heads, which divide num_heads; equal numbers are the attention of Vaswani et al."
  )
  head_dim: Annotated[int, WIDTH] = option(
    32, "Width of a head, P; even with position='rope', which rotates pairs of features."
  )
  position: Literal["rope", "relative", "none"] = option(
    "rope", "How positions are seen: rotary embedding, T5's bucketed bias on scores, or not at all."
  )
  rope_theta: Annotated[
    float, Bounds(1, LARGEST, "below 1, distant positions would turn faster than near ones")
  ] = option(10_000.0, "Longest wavelength of the rotary embedding, in units of 2 pi tokens.")
  relative_buckets: Annotated[int, Bounds(4, 2**16, "each bucket has a parameter a head")] = option(
    32, "Buckets of distances of position='relative'; a multiple of 4."
  )
  relative_max_distance: Annotated[int, ROWS] = option(
    128, "Tokens from which on all distances share the last bucket."
  )
  relative_shared: bool = option(
    False, "One table of biases for all layers of a stack (T5) instead of one a layer (GLaM)."
  )
  qkv_bias: bool = option(False, "Additive biases on queries, keys and values (Qwen).")
  qk_norm: bool = option(
    False, "RMSNorm over all of a token's query features, and over its key features (OLMoE)."
  )
  clip_qkv: Annotated[float, NOT_NEGATIVE] = option(
    0.0,
    "Queries, keys and values are clipped to [-clip_qkv, clip_qkv] (DBRX), after qk_norm; 0 = no.",
  )
  sliding_window: Annotated[int, dataclasses.replace(ROWS, low=0)] = option(
    0, "Tokens that a query sees, itself included (Mixtral); 0 means all earlier ones."
  )
  query_scale: Annotated[float, NOT_NEGATIVE] = option(
    0.0,
    "Factor on queries; 0 means head_dim ** -0.5 (T5 has 1.0). The query projection starts smaller "
    "by what this is larger, so that scores start with unit variance.",
  )


class Attention(nn.Module):
  """Grouped-query attention (Ainslie et al. 2023): query head h reads key-value head h // (heads /
  kv_heads).

  Queries, keys and values are projected; then, each where it is asked for: biases, normalisation,
  clipping, rotation. This is the order of OLMoE's published code, which has both of the middle two;
  DBRX clips and does not normalise.

  Attributes:
    options: The options of the section `model`.
    causal: Whether a query sees no later key of its document; otherwise it sees all keys of it.
    norm_eps: Epsilon of the norms of `qk_norm`.
    dropout: Probability of dropout on attention weights, in training.
    output_scale: Factor on the initial output projection.
    dtype: Dtype of the activations; parameters are float32.
  """

  options: AttentionOptions
  causal: bool = True
  norm_eps: float = 1e-6
  dropout: float = 0.0
  output_scale: float = 1.0
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B L D"],
    context: LayerContext,
    memory: Float[Array, "B Lk D"] | None = None,
    memory_segments: Int[Array, "B Lk"] | None = None,
  ) -> Float[Array, "B L D"]:
    """Self-attention, or attention from `x` to `memory`.

    Args:
      x: where queries come from.
      context: of x; padding sees padding.
      memory: where keys and values come from; None: from x. A query sees all of the memory that is
        of its own segment, early or late, and gets 0 where there is none. `position` must be
        "none".
      memory_segments: document of each place of the memory, as in `context`; padding is seen by
        nobody.

    Raises:
      ValueError: a memory without segments, or with positions.
    """
    if (memory is None) != (memory_segments is None):
      raise ValueError("a memory and its segments come together")
    if memory is not None and self.options.position != "none":
      raise ValueError(
        f"attention to a memory knows no positions: position={self.options.position!r} must be "
        "'none'"
      )
    width, factor = x.shape[-1], self.options.query_scale or self.options.head_dim**-0.5
    shrink = (
      self.options.head_dim**-0.5 / self.options.query_scale if self.options.query_scale else 1.0
    )
    source = x if memory is None else memory
    q = self._heads("query", x, self.options.num_heads, "heads", context, scale=shrink)
    k = self._heads("key", source, self.options.num_kv_heads, "kv_heads", context)
    v = self._heads("value", source, self.options.num_kv_heads, "kv_heads", context)
    q, k, v = (constrain(t, "batch", "length", "act_heads", "head_dim") for t in (q, k, v))
    q = q.reshape(*q.shape[:2], self.options.num_kv_heads, -1, self.options.head_dim) * factor
    mask = self._mask(context, memory_segments)
    mixed = attend(
      q,
      k,
      v,
      mask,
      bias=self._bias(context),
      drop=nn.Dropout(self.dropout, deterministic=not context.train),
    )
    mixed = mixed.reshape(*x.shape[:2], self.options.num_heads, self.options.head_dim)
    if memory is not None:
      mixed = jnp.where(jnp.any(mask, axis=-1)[..., None, None], mixed, 0)
    output = projection(
      self,
      "output",
      (self.options.num_heads, self.options.head_dim, width),
      ("heads", "head_dim", "embed"),
      fan_in=self.options.num_heads * self.options.head_dim,
      scale=self.output_scale,
      dtype=self.dtype,
    )
    return constrain(jnp.einsum("blhp,hpd->bld", mixed, output), "batch", "length", "act_embed")

  def _heads(
    self,
    name: str,
    x: Float[Array, "B L D"],
    count: int,
    axis: str,
    context: LayerContext,
    scale: float = 1.0,
  ) -> Float[Array, "B L H P"]:
    """Queries, keys or values of x, as scores and sums see them."""
    heads = jnp.einsum(
      "bld,dhp->blhp",
      x,
      projection(
        self,
        name,
        (x.shape[-1], count, self.options.head_dim),
        ("embed", axis, "head_dim"),
        fan_in=x.shape[-1],
        scale=scale,
        dtype=self.dtype,
      ),
    )
    if self.options.qkv_bias:
      heads += self.param(
        f"{name}_bias",
        nn.with_logical_partitioning(nn.initializers.zeros, (axis, "head_dim")),
        (count, self.options.head_dim),
        jnp.float32,
      ).astype(heads.dtype)
    if self.options.qk_norm and name != "value":
      norm = RmsNorm(self.norm_eps, name=f"{name}_norm")
      heads = norm(heads.reshape(*heads.shape[:2], -1)).reshape(heads.shape)
    if self.options.clip_qkv:
      heads = jnp.clip(heads, -self.options.clip_qkv, self.options.clip_qkv)
    rotated = self.options.position == "rope" and name != "value"
    return rope(heads, context.positions, self.options.rope_theta) if rotated else heads

  def _mask(
    self, context: LayerContext, memory_segments: Int[Array, "B Lk"] | None
  ) -> Bool[Array, "B L Lk"]:
    if memory_segments is None:
      return visible(context.segment_ids, self.causal, self.options.sliding_window)
    return (context.segment_ids[:, :, None] == memory_segments[:, None, :]) & (memory_segments > 0)[
      :, None, :
    ]

  def _bias(self, context: LayerContext) -> Float[Array, "B K G L L"] | None:
    """The relative bias, with query heads as [key-value head, query head of it]."""
    if self.options.position != "relative":
      return None
    distance = context.positions[:, :, None] - context.positions[:, None, :]
    table = context.bias_table
    if table is None:
      table = bias_table(self, self.options.num_heads, self.options.relative_buckets)
    bias = relative_bias(
      table,
      distance,
      bidirectional=not self.causal,
      max_distance=self.options.relative_max_distance,
    )
    return jnp.moveaxis(bias.reshape(self.options.num_kv_heads, -1, *distance.shape), 2, 0)


def attend(
  q: Float[Array, "B Lq K G P"],
  k: Float[Array, "B Lk K P"],
  v: Float[Array, "B Lk K U"],
  mask: Bool[Array, "B Lq Lk"],
  *,
  bias: Float[Array, "B K G Lq Lk"] | None = None,
  drop: Callable[[Array], Array] = lambda weights: weights,
) -> Float[Array, "B Lq K G U"]:
  """The averages of v with weights softmax(q k + bias), where G query heads read each of K
  key-value heads.

  Args:
    q: queries, scaled.
    k: keys.
    v: values, of any width.
    mask: which keys a query sees; one that sees none gets the plain average, which means nothing.
    bias: added to the scores.
    drop: applied to the weights.
  """
  scores = jnp.einsum("bqhgp,bkhp->bhgqk", q, k, preferred_element_type=jnp.float32)
  scores = scores if bias is None else scores + bias
  scores = jnp.where(mask[:, None, None], scores, MASKED)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.einsum("bhgqk,bkhp->bqhgp", drop(weights), v)


def visible(
  segment_ids: Int[Array, "B L"], causal: bool = True, window: int = 0
) -> Bool[Array, "B L L"]:
  """Which key a query sees: those of its document, if causal no later one and, if window is not 0,
  the last `window`.

  Padding sees padding, as if that were a document.
  """
  same = segment_ids[:, :, None] == segment_ids[:, None, :]
  if not causal:
    return same
  place = jnp.arange(segment_ids.shape[1])
  seen = place[:, None] >= place
  if window:
    seen &= place[:, None] - place < window
  return seen & same
