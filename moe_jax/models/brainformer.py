"""Brainformers (Zhou et al. 2023, arXiv 2306.00008): blocks that are lists of sublayers in any
order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe_jax.layers import Aux, LayerContext, LayerRouting, Microbatch
from moe_jax.layers.init import projection
from moe_jax.models.decoder import embed, next_token_logits, reduce_losses
from moe_jax.models.stack import Factory, make_block, outside_routing, run_layers
from moe_jax.routing import RoutingPlan
from moe_jax.sharding import constrain

# Table 1 of the paper: what each kind of sublayer may be; a block has 8 of them, in any order. Its
# capacity factors are "1 to 4"; the whole numbers are taken here. Its gated ReLU and GELU are reglu
# and geglu.
SEARCH_SPACE: Mapping[str, Mapping[str, tuple[int | float | str, ...]]] = {
  "attention": {"width": (512, 768, 1024), "heads": (12, 16, 20)},
  "ffn": {
    "width": (512, 768, 1024),
    "hidden": (1536, 2048, 3072, 4096),
    "activation": ("reglu", "geglu", "relu", "gelu"),
  },
  "moe": {
    "width": (512, 768, 1024),
    "hidden": (1536, 2048, 3072, 4096),
    "activation": ("reglu", "geglu", "relu", "gelu"),
    "gate": ("top_2", "expert_choice"),
    "capacity": (1.0, 2.0, 3.0, 4.0),
  },
}
BLOCK_SUBLAYERS = 8


class Sublayer(nn.Module):
  """x + layer(norm(x)): one attention, dense FFN or MoE layer, pre-norm, with dropout on the
  addition.

  Parameters are named as those of the decoder's `Block`: `attention_norm` and `attention`, or
  `ffn_norm` and `ffn`, which may have experts; and, where the sublayer's width W is not the
  stream's D, `to_width` and `from_width`.

  Deviation: the paper gives sublayers model dimensions of 512, 768 and 1024 and does not say how
  one feeds the next. Here the residual stream has one width, and a sublayer of another one is
  entered and left by a matrix without bias.

  Attributes:
    layer: makes the `Attention`, or the `DenseFfn` or `MoeLayer`, of width W.
    attends: whether it is the first of these.
    norm: makes a normalisation, of the stream.
    width: W.
    dropout: probability.
    dtype: of the activations.
  """

  layer: Factory
  attends: bool
  norm: Factory
  width: int
  dropout: float = 0.0
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "B L D"], context: LayerContext, routing: LayerRouting | None = None
  ) -> tuple[Float[Array, "B L D"], Aux]:
    name, stream = "attention" if self.attends else "ffn", x.shape[-1]
    y = self.norm(name=f"{name}_norm")(x)
    if self.width != stream:
      y = y @ projection(
        self, "to_width", (stream, self.width), ("embed", None), fan_in=stream, dtype=self.dtype
      )
    layer = self.layer(name=name)
    y, aux = (layer(y, context), Aux()) if self.attends else layer(y, context, routing)
    if self.width != stream:
      y = y @ projection(
        self,
        "from_width",
        (self.width, stream),
        (None, "embed"),
        fan_in=self.width,
        dtype=self.dtype,
      )
    y = nn.Dropout(self.dropout, deterministic=not context.train)(y)
    return constrain(x + y, "batch", "length", "act_embed"), aux


class Brainformer(nn.Module):
  """Token ids in, next-token logits out: `Decoder` with a list of sublayers in place of its layers.

  Parameters: as `Decoder`'s, each sublayer being a layer. What repeats is compiled once: the block,
  where it is stacked, or a shorter stretch, where the block itself repeats one.

  Attributes:
    vocab_size: V.
    d_model: D, of the residual stream.
    layout: for each sublayer of all blocks, a key of `sublayers`.
    sublayers: name -> the fields of a `Sublayer`, without norm, dropout and dtype; frozen, so that
      a model has a hash.
    has_experts: for each sublayer, whether it has experts; all have the same number.
    norm, num_biased_experts, embed_scale, tied_embeddings, dropout, dtype, remat, layer_reduce,
      seed: see `Decoder`.
    scan_layers: compile what repeats once.
  """

  vocab_size: int
  d_model: int
  layout: Sequence[str]
  sublayers: FrozenDict[str, FrozenDict]
  has_experts: Sequence[bool]
  norm: Factory
  num_biased_experts: int = 0
  embed_scale: bool = True
  tied_embeddings: bool = True
  dropout: float = 0.0
  dtype: DTypeLike = jnp.float32
  scan_layers: bool = True
  remat: str = "none"
  layer_reduce: str = "mean"
  seed: int | Int[Array, ""] = 0

  @nn.compact
  def __call__(
    self,
    tokens: Int[Array, "B L"],
    segment_ids: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    *,
    train: bool,
    return_routing: bool = False,
    stored: RoutingPlan | None = None,
    micro: Microbatch | None = None,
  ) -> tuple[Float[Array, "B L V"], Aux]:
    """As `Decoder`; where sublayers route differently, shorter plans are filled up with assignments
    to nobody."""
    context = LayerContext(
      tokens, segment_ids, positions, train=train, return_routing=return_routing, micro=micro
    )
    table, x = embed(self, tokens, train)
    outside = outside_routing(self, stored, micro)
    x, aux = run_layers(
      self._sublayer, self.has_experts, self.scan_layers, x, context, outside, kinds=self.layout
    )
    logits = next_token_logits(self, self.norm(name="final_norm")(x), table)
    return logits, reduce_losses(self, aux)

  def _sublayer(self, name: str, scanned: bool) -> Factory:
    return make_block(
      self.remat,
      scanned,
      Sublayer,
      norm=self.norm,
      dropout=self.dropout,
      dtype=self.dtype,
      **self.sublayers[name],
    )
