"""Attention within documents: rotary, relative or no positions, grouped queries, float32
softmax."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from moe_jax.layers.aux import LayerContext
from moe_jax.layers.init import projection
from moe_jax.layers.norms import RmsNorm
from moe_jax.layers.relative_bias import bias_table, relative_bias
from moe_jax.sharding import constrain

MASKED = (
  -0.7 * jnp.finfo(jnp.float32).max
)  # finite: a row that is masked everywhere gives numbers, not NaN
POSITIONS = ("rope", "relative", "none")


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


class Attention(nn.Module):
  """Grouped-query attention (Ainslie et al. 2023): query head h reads key-value head h // (heads /
  kv_heads).

  Queries, keys and values are projected; then, each where it is asked for: biases, normalisation,
  clipping, rotation. This is the order of OLMoE's published code, which has both of the middle two;
  DBRX clips and does not normalise.

  Attributes:
    num_heads: query heads; a multiple of num_kv_heads.
    num_kv_heads: key-value heads; num_heads is the full attention of Vaswani et al. 2017.
    head_dim: P; even if position is "rope".
    causal: a query sees no later key of its document; False: all keys of it.
    position: "rope", "relative" (`relative_bias`, two-sided unless causal, from a table of the
      layer's own unless the context brings the one of the stack) or "none".
    rope_theta: longest wavelength of the rotary embedding, in units of 2 pi tokens.
    relative_buckets: of the relative bias, see `bucket`; a multiple of 4.
    relative_max_distance: likewise, in tokens; above half of relative_buckets.
    qkv_bias: additive biases, 0 at first, on queries, keys and values (Qwen).
    qk_norm: RMSNorm over all H * P features of a token's query, and over those of its key (OLMoE).
    norm_eps: epsilon of these two norms.
    clip_qkv: queries, keys and values are cut to [-clip_qkv, clip_qkv] (DBRX); 0: they are not.
    sliding_window: a causal query sees so many keys, the one at its own place included (Mixtral);
      0: all earlier ones.
    query_scale: factor on queries; 0: 1/sqrt(P). The query projection begins smaller by what this
      is larger (T5's 1.0 with (D P)^-1/2), so that scores begin with unit variance.
    dropout: probability, on attention weights, in training.
    output_scale: factor on the initial output projection.
    dtype: of the activations; parameters are float32.
  """

  num_heads: int
  num_kv_heads: int
  head_dim: int
  causal: bool = True
  position: str = "rope"
  rope_theta: float = 10_000.0
  relative_buckets: int = 32
  relative_max_distance: int = 128
  qkv_bias: bool = False
  qk_norm: bool = False
  norm_eps: float = 1e-6
  clip_qkv: float = 0.0
  sliding_window: int = 0
  query_scale: float = 0.0
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
    if memory is not None and self.position != "none":
      raise ValueError(
        f"attention to a memory knows no positions: position={self.position!r} must be 'none'"
      )
    width, factor = x.shape[-1], self.query_scale or self.head_dim**-0.5
    shrink = self.head_dim**-0.5 / self.query_scale if self.query_scale else 1.0
    source = x if memory is None else memory
    q = self._heads("query", x, self.num_heads, "heads", context, scale=shrink)
    k = self._heads("key", source, self.num_kv_heads, "kv_heads", context)
    v = self._heads("value", source, self.num_kv_heads, "kv_heads", context)
    q, k, v = (constrain(t, "batch", "length", "act_heads", "head_dim") for t in (q, k, v))
    q = q.reshape(*q.shape[:2], self.num_kv_heads, -1, self.head_dim) * factor
    mask = self._mask(context, memory_segments)
    mixed = attend(
      q,
      k,
      v,
      mask,
      bias=self._bias(context),
      drop=nn.Dropout(self.dropout, deterministic=not context.train),
    )
    mixed = mixed.reshape(*x.shape[:2], self.num_heads, self.head_dim)
    if memory is not None:
      mixed = jnp.where(jnp.any(mask, axis=-1)[..., None, None], mixed, 0)
    output = projection(
      self,
      "output",
      (self.num_heads, self.head_dim, width),
      ("heads", "head_dim", "embed"),
      fan_in=self.num_heads * self.head_dim,
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
        (x.shape[-1], count, self.head_dim),
        ("embed", axis, "head_dim"),
        fan_in=x.shape[-1],
        scale=scale,
        dtype=self.dtype,
      ),
    )
    if self.qkv_bias:
      heads += self.param(
        f"{name}_bias",
        nn.with_logical_partitioning(nn.initializers.zeros, (axis, "head_dim")),
        (count, self.head_dim),
        jnp.float32,
      ).astype(heads.dtype)
    if self.qk_norm and name != "value":
      norm = RmsNorm(self.norm_eps, name=f"{name}_norm")
      heads = norm(heads.reshape(*heads.shape[:2], -1)).reshape(heads.shape)
    if self.clip_qkv:
      heads = jnp.clip(heads, -self.clip_qkv, self.clip_qkv)
    rotated = self.position == "rope" and name != "value"
    return rope(heads, context.positions, self.rope_theta) if rotated else heads

  def _mask(
    self, context: LayerContext, memory_segments: Int[Array, "B Lk"] | None
  ) -> Bool[Array, "B L Lk"]:
    if memory_segments is None:
      return visible(context.segment_ids, self.causal, self.sliding_window)
    return (context.segment_ids[:, :, None] == memory_segments[:, None, :]) & (memory_segments > 0)[
      :, None, :
    ]

  def _bias(self, context: LayerContext) -> Float[Array, "B K G L L"] | None:
    """The relative bias, with query heads as [key-value head, query head of it]."""
    if self.position != "relative":
      return None
    distance = context.positions[:, :, None] - context.positions[:, None, :]
    table = context.bias_table
    if table is None:
      table = bias_table(self, self.num_heads, self.relative_buckets)
    bias = relative_bias(
      table, distance, bidirectional=not self.causal, max_distance=self.relative_max_distance
    )
    return jnp.moveaxis(bias.reshape(self.num_kv_heads, -1, *distance.shape), 2, 0)


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
