"""Grouped-query attention within documents, with rotary, relative or no position information."""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.layers.attend import attend, visible
from moe_jax.layers.aux import LayerContext
from moe_jax.layers.blocked_attention import attend_in_blocks, uses_blocks
from moe_jax.layers.cache import distances, remember, visible_places
from moe_jax.layers.init import parameter, projection
from moe_jax.layers.norms import RmsNorm
from moe_jax.layers.relative_bias import bias_table, relative_bias
from moe_jax.layers.rope_scaling import RopeOptions, kept_share
from moe_jax.layers.splash_attention import attend_by_splash, obstacle
from moe_jax.options import (
  LARGEST,
  NOT_NEGATIVE,
  OPTIONAL_WIDTH,
  ROWS,
  WIDTH,
  Bounds,
  Options,
  option,
)
from moe_jax.sharding import constrain


def rope(
  x: Float[Array, "B L H P"],
  positions: Int[Array, "B L"],
  theta: float,
  scaling: RopeOptions = RopeOptions(),
) -> Float[Array, "B L H P"]:
  """Returns `x` with rotary position embedding (Su et al. 2021).

  The feature pair (i, i + P/2) is rotated by the angle position * theta^(-2i/P). The dot product of
  a rotated query and a rotated key therefore depends only on the difference of their positions.
  The arithmetic is float32, and the result has the dtype of `x`.

  Args:
    x: Queries or keys. P must be even.
    positions: Position of each token in its document.
    theta: Base of the frequencies; the longest wavelength approaches 2 pi theta tokens.
    scaling: How the frequencies are changed for longer rows; see `rope_scaling.py`.
  """
  half = x.shape[-1] // 2
  frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  if scaling.scaling != "none":
    kept = kept_share(half, theta, scaling)
    frequency *= jnp.asarray(kept + (1 - kept) / scaling.factor, jnp.float32)
  angle = positions[:, :, None, None].astype(jnp.float32) * frequency  # [B, L, 1, P/2]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  if scaling.amplitude != 1:
    cos, sin = scaling.amplitude * cos, scaling.amplitude * sin
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
  output_bias: bool = option(False, "An additive bias on the output projection (LLaMA's option).")
  qk_norm: bool = option(
    False, "RMSNorm over all of a token's query features, and over its key features (OLMoE)."
  )
  qk_norm_over: Literal["token", "head"] = option(
    "token",
    "What qk_norm averages: all heads of a token, or each head by itself, with one scale for all "
    "heads (Qwen3, GLM-4.5).",
  )
  clip_qkv: Annotated[float, NOT_NEGATIVE] = option(
    0.0,
    "Queries, keys and values are clipped to [-clip_qkv, clip_qkv] (DBRX), after qk_norm; 0 = no.",
  )
  sliding_window: Annotated[int, dataclasses.replace(ROWS, low=0)] = option(
    0, "Tokens that a query sees, itself included (Mixtral); 0 means all earlier ones."
  )
  global_every: Annotated[int, dataclasses.replace(ROWS, low=0)] = option(
    0,
    "Layers i, from 0, with (i + 1) % global_every == 0 have no sliding_window (gpt-oss: 2); 0 "
    "means that all layers are alike.",
  )
  global_positions: bool = option(
    True, "Whether the layers of global_every see positions (Llama 4's do not)."
  )
  rotary_dim: Annotated[int, OPTIONAL_WIDTH] = option(
    0, "Features of a head, from the first, that position='rope' rotates (GLM-4.5); even; 0 = all."
  )
  sinks: bool = option(
    False,
    "A learned number of each head beside its scores in the softmax, for which there is no value "
    "(gpt-oss), so that a query may attend to nothing.",
  )
  query_scale: Annotated[float, NOT_NEGATIVE] = option(
    0.0,
    "Factor on queries; 0 means head_dim ** -0.5 (T5 has 1.0). The query projection starts smaller "
    "by what this is larger, so that scores start with unit variance.",
  )


class Attention(nn.Module):
  """Grouped-query attention (Ainslie et al. 2023), as self-attention or as cross-attention.

  Query head h reads key-value head h // (heads / kv_heads). Queries, keys and values are projected
  and then, in this order and as far as the options ask for it, get biases, normalisation, clipping
  and rotation. This is the order of OLMoE's published code, which both normalises and clips; DBRX
  clips and does not normalise. The softmax is float32.

  Attributes:
    options: The options of the section `model`.
    rope: The section `model.rope`.
    causal: Whether a query sees no later key of its document. Otherwise it sees all keys of its
      document.
    norm_eps: Epsilon of the norms of `qk_norm`.
    dropout: Probability of dropout on attention weights, in training. Its random numbers depend on
      `block`.
    block: Number of queries whose scores are computed at a time. Rows of fewer than four blocks are
      computed at once, and so is what reads a cache; 0 means that all rows are.
    kernel: What computes self-attention in the rows that have blocks: "blocks", or, on TPUs,
      "splash" where there is no `obstacle`.
    output_scale: Factor on the initial output projection.
    dtype: Dtype of the activations. Parameters are float32.
  """

  options: AttentionOptions
  rope: RopeOptions = RopeOptions()
  causal: bool = True
  norm_eps: float = 1e-6
  dropout: float = 0.0
  block: int = 0
  kernel: Literal["blocks", "splash"] = "blocks"
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
    """Applies self-attention to `x`, or cross-attention from `x` to `memory`.

    Args:
      x: The input of the queries and, in self-attention, of the keys and values.
      context: Segments and positions of `x`. In self-attention, padding sees padding.
      memory: The input of the keys and values in cross-attention, which requires the option
        `position` to be "none". A query sees the whole memory of its own segment, and gets 0 if
        there is none. None means self-attention.
      memory_segments: Segment of each token of the memory, as in `context`; required together with
        `memory`. No query sees padding. With `context.cached`, the memory's keys and values are
        kept, and later calls give only its segments.

    Raises:
      ValueError: Only one of `memory` and `memory_segments` is given and no keys of a memory are
        kept, or a memory is given although `position` is not "none".
    """
    is_kept = memory is None and self.has_variable("cache", "memory_key")
    if (memory is None) != (memory_segments is None) and not is_kept:
      raise ValueError("memory and memory_segments must be given together")
    if memory is not None and self.options.position != "none":
      raise ValueError(
        "attention to a memory cannot use positions: "
        f"position={self.options.position!r} must be 'none'"
      )
    width, factor = x.shape[-1], self.options.query_scale or self.options.head_dim**-0.5
    # Keeps the initial variance of the scores at 1 when `query_scale` is not head_dim ** -0.5.
    shrink = (
      self.options.head_dim**-0.5 / self.options.query_scale if self.options.query_scale else 1.0
    )
    q = self._heads("query", x, self.options.num_heads, "heads", context, scale=shrink)
    if is_kept:
      k, v = (self.get_variable("cache", f"memory_{name}") for name in ("key", "value"))
    else:
      source = x if memory is None else memory
      k = self._heads("key", source, self.options.num_kv_heads, "kv_heads", context)
      v = self._heads("value", source, self.options.num_kv_heads, "kv_heads", context)
    q, k, v = (constrain(t, "batch", "length", "act_heads", "head_dim") for t in (q, k, v))
    # [B, L, K, G, P]: the G query heads that read the same key-value head become an axis.
    q = q.reshape(*q.shape[:2], self.options.num_kv_heads, -1, self.options.head_dim) * factor
    places = None
    if context.cached is not None and memory_segments is None:
      kept, places = remember(
        self,
        context.cached,
        {"key": k, "value": v},
        ("act_heads", "head_dim"),
        self.options.sliding_window,
      )
      k, v = kept["key"], kept["value"]
    elif context.cached is not None and not is_kept:
      self.put_variable("cache", "memory_key", k)
      self.put_variable("cache", "memory_value", v)
    if places is None and uses_blocks(x.shape[1], self.block):
      mixed = self._by_blocks(q, k, v, context, memory_segments)
    else:
      mixed = self._at_once(q, k, v, context, memory_segments, places)
    mixed = mixed.reshape(*x.shape[:2], self.options.num_heads, self.options.head_dim)
    output = projection(
      self,
      "output",
      (self.options.num_heads, self.options.head_dim, width),
      ("heads", "head_dim", "embed"),
      fan_in=self.options.num_heads * self.options.head_dim,
      scale=self.output_scale,
      dtype=self.dtype,
    )
    y = jnp.einsum("blhp,hpd->bld", mixed, output)
    if self.options.output_bias:
      bias = parameter(self, "output_bias", nn.initializers.zeros, (width,), ("norm",))
      y += bias.astype(y.dtype)
    return constrain(y, "batch", "length", "act_embed")

  def _heads(
    self,
    name: str,
    x: Float[Array, "B L D"],
    count: int,
    axis: str,
    context: LayerContext,
    scale: float = 1.0,
  ) -> Float[Array, "B L H P"]:
    """Returns the queries, keys or values of `x`, with every step that the options ask for.

    Args:
      name: "query", "key" or "value". It also names the parameters.
      x: The input of the projection.
      count: Number of heads.
      axis: Logical name of the axis of heads.
      context: Positions of `x`, for the rotary embedding.
      scale: Factor on the initial projection.
    """
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
      heads += parameter(
        self,
        f"{name}_bias",
        nn.initializers.zeros,
        (count, self.options.head_dim),
        (axis, "head_dim"),
      ).astype(heads.dtype)
    if self.options.qk_norm and name != "value":
      norm = RmsNorm(self.norm_eps, name=f"{name}_norm")
      if self.options.qk_norm_over == "head":
        heads = norm(heads)
      else:
        heads = norm(heads.reshape(*heads.shape[:2], -1)).reshape(heads.shape)
    if self.options.clip_qkv:
      heads = jnp.clip(heads, -self.options.clip_qkv, self.options.clip_qkv)
    rotated = self.options.position == "rope" and name != "value"
    if not rotated:
      return heads
    theta, turned = self.options.rope_theta, self.options.rotary_dim or self.options.head_dim
    if turned == self.options.head_dim:
      return rope(heads, context.positions, theta, self.rope)
    first = rope(heads[..., :turned], context.positions, theta, self.rope)
    return jnp.concatenate([first, heads[..., turned:]], axis=-1)

  def _at_once(
    self,
    q: Float[Array, "B L K G P"],
    k: Float[Array, "B Lk K P"],
    v: Float[Array, "B Lk K P"],
    context: LayerContext,
    memory_segments: Int[Array, "B Lk"] | None,
    places: Int[Array, "Lk"] | None,
  ) -> Float[Array, "B L K G P"]:
    """Returns the averages of the values, with the scores of all queries and keys at once.

    Args:
      q: Queries, already scaled.
      k: Keys.
      v: Values.
      context: See `__call__`.
      memory_segments: See `__call__`; None in self-attention.
      places: The places of the keys of a cache; None without one.
    """
    mask = self._mask(context, memory_segments, places)
    bias = None
    if self.options.position == "relative":
      if context.cached is None or places is None:
        distance = context.positions[:, :, None] - context.positions[:, None, :]
      else:
        # One row stands for all, because it broadcasts.
        distance = distances(context.cached, context.positions.shape[1], places)[None]
      bias = self._bias(self._table(context), distance)
    drop = nn.Dropout(self.dropout, deterministic=not context.train)
    mixed = attend(q, k, v, mask, bias=bias, sink=self._sink(), drop=drop)
    if memory_segments is None:
      return mixed
    # A query that sees no key would otherwise get the plain average of all values.
    return jnp.where(jnp.any(mask, axis=-1)[:, :, None, None, None], mixed, 0)

  def _by_blocks(
    self,
    q: Float[Array, "B L K G P"],
    k: Float[Array, "B Lk K P"],
    v: Float[Array, "B Lk K P"],
    context: LayerContext,
    memory_segments: Int[Array, "B Lk"] | None,
  ) -> Float[Array, "B L K G P"]:
    """Returns what `_at_once` returns without a cache, by blocks of queries."""
    is_self = memory_segments is None
    if self.kernel == "splash" and is_self and not self._obstacle(q.shape[1], context.train):
      return attend_by_splash(
        q, k, v, context.segment_ids, causal=self.causal, window=self.options.sliding_window
      )
    bias = drop = None
    if self.options.position == "relative":
      bias = functools.partial(self._bias, self._table(context))
    if self.dropout and context.train:
      drop = functools.partial(_drop, self.make_rng("dropout"), self.dropout)
    return attend_in_blocks(
      q,
      k,
      v,
      context.segment_ids,
      # Padding of a memory is seen by no query, not even by padding.
      context.segment_ids if is_self else jnp.where(memory_segments > 0, memory_segments, -1),
      block=self.block,
      causal=self.causal and is_self,
      window=self.options.sliding_window,
      positions=context.positions if is_self else None,
      bias=bias,
      sink=self._sink(),
      drop=drop,
    )

  def _sink(self) -> Float[Array, "K G"] | None:
    """Returns the sinks of the query heads that read each key-value head, or None without any."""
    if not self.options.sinks:
      return None
    zeros = nn.initializers.zeros
    sink = parameter(self, "sink_bias", zeros, (self.options.num_heads,), ("heads",))
    return sink.reshape(self.options.num_kv_heads, -1)

  def _obstacle(self, length: int, train: bool) -> str:
    """Returns why the TPU's kernel cannot compute self-attention, or "" if it can."""
    return obstacle(
      length,
      self.options.num_kv_heads,
      has_bias=self.options.position == "relative",
      has_sinks=self.options.sinks,
      has_dropout=self.dropout > 0 and train,
    )

  def _mask(
    self,
    context: LayerContext,
    memory_segments: Int[Array, "B Lk"] | None,
    places: Int[Array, "Lk"] | None,
  ) -> Bool[Array, "B L Lk"]:
    """Returns True where a query sees a key, for self-attention or for attention to a memory.

    The keys of self-attention are those of the same tokens or, if `places` is given, those of the
    cache (`cache.remember`).
    """
    window = self.options.sliding_window
    if context.cached is not None and places is not None:
      return visible_places(context.cached, context.segment_ids, places, window)
    if memory_segments is None:
      return visible(context.segment_ids, self.causal, window)
    return (context.segment_ids[:, :, None] == memory_segments[:, None, :]) & (memory_segments > 0)[
      :, None, :
    ]

  def _table(self, context: LayerContext) -> Float[Array, "H N"]:
    """Returns the table of relative biases, which the layers of a stack may share."""
    if context.bias_table is not None:
      return context.bias_table
    return bias_table(self, self.options.num_heads, self.options.relative_buckets)

  def _bias(
    self, table: Float[Array, "H N"], distance: Int[Array, "#B L Lk"]
  ) -> Float[Array, "#B K G L Lk"]:
    """Returns the bias of the scores, for K key-value heads and G query heads of each.

    Args:
      table: The result of `_table`.
      distance: The query's position minus the key's.
    """
    bias = relative_bias(
      table,
      distance,
      bidirectional=not self.causal,
      max_distance=self.options.relative_max_distance,
    )
    return jnp.moveaxis(bias.reshape(self.options.num_kv_heads, -1, *distance.shape), 2, 0)


def _drop(key: Key[Array, ""], rate: float, index: Int[Array, ""], weights: Array) -> Array:
  """Returns the weights of a block after dropout, with other random numbers in each block.

  Args:
    key: The key of the layer.
    rate: Probability that a weight becomes 0.
    index: Index of the block.
    weights: The weights.
  """
  is_kept = jax.random.bernoulli(jax.random.fold_in(key, index), 1 - rate, weights.shape)
  return jnp.where(is_kept, weights / (1 - rate), 0)
