"""DeepSeek-V2's multi-head latent attention.

The keys and values of all heads are computed from one narrow vector per token, the latent.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe_jax.layers.attend import attend, visible
from moe_jax.layers.attention import rope
from moe_jax.layers.aux import LayerContext
from moe_jax.layers.blocked_attention import attend_in_blocks, uses_blocks
from moe_jax.layers.cache import Cached, remember, visible_places
from moe_jax.layers.init import projection
from moe_jax.layers.norms import RmsNorm
from moe_jax.layers.rope_scaling import RopeOptions
from moe_jax.layers.splash_attention import attend_by_splash, obstacle
from moe_jax.options import OPTIONAL_WIDTH, WIDTH, Options, option
from moe_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class LatentOptions(Options):
  """The section `model.latent`: the widths of latent attention."""

  kv_rank: Annotated[int, WIDTH] = option(512, "Width of the latent of keys and values, c.")
  query_rank: Annotated[int, OPTIONAL_WIDTH] = option(
    0, "Width of the latent of queries, b; 0 means that queries come from x itself."
  )
  nope_dim: Annotated[int, WIDTH] = option(
    128, "Features of a query and a key that are not rotated."
  )
  rope_dim: Annotated[int, WIDTH] = option(64, "Features of them that are rotated; even.")
  value_dim: Annotated[int, WIDTH] = option(128, "Features of a value.")


class LatentAttention(nn.Module):
  """Causal attention within documents whose keys and values are up-projections of a latent.

  Paper: DeepSeek-V2 (arXiv 2405.04434) Sec. 2.1.2 and 2.1.3, with RMSNorm on both latents as in
  Sec. 3.1.2:

      c = norm(W_latent x),  k_h = [W_key,h c; rope(W_key_rope x)],  v_h = W_value,h c
      b = norm(W_query_latent x), or x itself,  q_h = W_query,h b, whose last rope_dim features are
                                                rotated
      o_h = softmax(q_h k_h / sqrt(nope_dim + rope_dim)) v_h,  y = W_output [o_1; ...; o_H]

  All heads share the rotated part of the key. In training, all keys and values are computed. In
  decoding, the cache holds only c and the rotated part, which is kv_rank + rope_dim numbers per
  token, and W_key,h and W_value,h are applied to queries and outputs instead:

      q_h k_h = (W_key,h^T q_nope,h) c + q_rope,h k_rope,  o_h = W_value,h (softmax(...) c)

  This computes the same function with other roundings.

  The epsilon of both latents' norms is 1e-6 as in the released code, whatever the epsilon of the
  blocks' norms is.

  Deviation: the feature pairs (i, i + rope_dim/2) are rotated, where the released code rotates
  (2i, 2i + 1). The two differ only by a fixed permutation of the features.

  Attributes:
    options: The section `model.latent`.
    num_heads: Number of heads H.
    rope_theta: See `AttentionOptions`.
    rope: The section `model.rope`.
    block: See `Attention`.
    kernel: See `Attention`.
    output_scale: Factor on the initial output projection.
    dtype: Dtype of the activations. Parameters are float32.
  """

  options: LatentOptions
  num_heads: int
  rope_theta: float = 10_000.0
  rope: RopeOptions = RopeOptions()
  block: int = 0
  kernel: Literal["blocks", "splash"] = "blocks"
  output_scale: float = 1.0
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "B L D"], context: LayerContext) -> Float[Array, "B L D"]:
    """Applies causal self-attention to `x`, with the segments and positions of `context`."""
    width, key_dim = x.shape[-1], self.options.nope_dim + self.options.rope_dim

    def rotated(features):
      return rope(features, context.positions, self.rope_theta, self.rope)

    latent = self._latent("latent", x, self.options.kv_rank)
    q = self._heads(
      "query",
      self._latent("query_latent", x, self.options.query_rank) if self.options.query_rank else x,
      key_dim,
    )
    q = jnp.concatenate(
      [q[..., : self.options.nope_dim], rotated(q[..., self.options.nope_dim :])], axis=-1
    )
    q = q if self.rope.score_factor == 1 else q * self.rope.score_factor
    shared = rotated(self._down("key_rope", x, self.options.rope_dim)[:, :, None])  # [B, L, 1, R]
    if context.cached is not None:
      mixed = self._from_cache(
        q * key_dim**-0.5, latent, shared[:, :, 0], context.cached, context.segment_ids
      )
      return self._output(mixed, width)
    k = self._heads("key", latent, self.options.nope_dim)
    k = jnp.concatenate(
      [k, jnp.broadcast_to(shared, (*k.shape[:3], self.options.rope_dim))], axis=-1
    )
    v = self._heads("value", latent, self.options.value_dim)
    q, k, v = (constrain(t, "batch", "length", "act_heads", "head_dim") for t in (q, k, v))
    # `attend` expects an axis of the query heads that share a key-value head; here there is one
    # query head each.
    q = (q * key_dim**-0.5)[:, :, :, None]
    segments = context.segment_ids
    in_blocks = uses_blocks(x.shape[1], self.block)
    stopped = obstacle(
      x.shape[1], self.num_heads, has_bias=False, has_sinks=False, has_dropout=False
    )
    if in_blocks and self.kernel == "splash" and not stopped:
      mixed = attend_by_splash(q, k, v, segments)
    elif in_blocks:
      mixed = attend_in_blocks(q, k, v, segments, segments, block=self.block)
    else:
      mixed = attend(q, k, v, visible(segments))
    return self._output(mixed[:, :, :, 0], width)

  def _from_cache(
    self,
    q: Float[Array, "B L H P"],
    latent: Float[Array, "B L R"],
    key_rope: Float[Array, "B L Q"],
    cached: Cached,
    segment_ids: Int[Array, "B L"],
  ) -> Float[Array, "B L H U"]:
    """Returns what each head reads from the latents of these tokens and of those before them.

    Args:
      q: Queries, already scaled, whose rotated features come last.
      latent: The latents of the tokens.
      key_rope: The rotated features of their keys.
      cached: The places of the tokens.
      segment_ids: Their documents.
    """
    key, value = self._up("key", self.options.nope_dim), self._up("value", self.options.value_dim)
    kept, places = remember(self, cached, {"latent": latent, "key_rope": key_rope}, (None,))
    q_latent = jnp.einsum("blhp,rhp->blhr", q[..., : self.options.nope_dim], key)
    q = jnp.concatenate([q_latent, q[..., self.options.nope_dim :]], axis=-1)
    k = jnp.concatenate([kept["latent"], kept["key_rope"]], axis=-1)
    mask = visible_places(cached, segment_ids, places)
    # All heads read one key, the latent with the rotated features, and one value, the latent.
    mixed = attend(q[:, :, None], k[:, :, None], kept["latent"][:, :, None], mask)[:, :, 0]
    return jnp.einsum("blhr,rhp->blhp", mixed, value)

  def _output(self, mixed: Float[Array, "B L H U"], width: int) -> Float[Array, "B L D"]:
    """Returns the sum of the output projections of all heads, D = `width` features."""
    output = projection(
      self,
      "output",
      (self.num_heads, self.options.value_dim, width),
      ("heads", "head_dim", "embed"),
      fan_in=self.num_heads * self.options.value_dim,
      scale=self.output_scale,
      dtype=self.dtype,
    )
    return constrain(jnp.einsum("blhp,hpd->bld", mixed, output), "batch", "length", "act_embed")

  def _down(self, name: str, x: Float[Array, "B L D"], rank: int) -> Float[Array, "B L R"]:
    """Projects `x` to `rank` features."""
    return x @ projection(
      self, name, (x.shape[-1], rank), ("embed", None), fan_in=x.shape[-1], dtype=self.dtype
    )

  def _latent(self, name: str, x: Float[Array, "B L D"], rank: int) -> Float[Array, "B L R"]:
    """Returns the normalised latent of `rank` features."""
    return RmsNorm(1e-6, name=f"{name}_norm")(self._down(name, x, rank))

  def _heads(
    self, name: str, latent: Float[Array, "B L R"], features: int
  ) -> Float[Array, "B L H P"]:
    """Projects the latent to `features` features for each head."""
    return jnp.einsum("blr,rhp->blhp", latent, self._up(name, features, latent.shape[-1]))

  def _up(self, name: str, features: int, rank: int = 0) -> Float[Array, "R H P"]:
    """Returns the up-projections of all heads from `rank` features, or from kv_rank if it is 0."""
    rank = rank or self.options.kv_rank
    return projection(
      self,
      name,
      (rank, self.num_heads, features),
      ("embed", "heads", "head_dim"),
      fan_in=rank,
      dtype=self.dtype,
    )
