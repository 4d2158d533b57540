"""LSTM layers with a mixture of experts between them (Shazeer et al. 2017, arXiv 1701.06538,
appendices C and D)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe_jax.layers import Aux, LayerContext, LayerRouting, Microbatch
from moe_jax.models.decoder import embed, next_token_logits, reduce_losses
from moe_jax.models.stack import Factory, make_block, outside_routing, run_layers
from moe_jax.routing import RoutingPlan
from moe_jax.sharding import constrain


class LstmBlock(nn.Module):
  """x + drop(lstm(x)) and, in layers with experts, then x + drop(sigmoid(moe(x))): appendix C.1.
  There are no norms.

  Attributes:
    lstm: makes the LSTM, whose output is as wide as x.
    moe: makes the layer of experts, which sees all time steps of all rows at once; None: there is
      none.
    dropout: probability, on what each of the two adds.
  """

  lstm: Factory
  moe: Factory | None = None
  dropout: float = 0.0

  @nn.compact
  def __call__(
    self, x: Float[Array, "B L D"], context: LayerContext, routing: LayerRouting | None = None
  ) -> tuple[Float[Array, "B L D"], Aux]:
    def drop(y):
      return nn.Dropout(self.dropout, deterministic=not context.train)(y)

    x, aux = x + drop(self.lstm(name="lstm")(x, context.positions)), Aux()
    if self.moe is not None:
      y, aux = self.moe(name="moe")(x, context, routing)
      x = x + drop(jax.nn.sigmoid(y))
    return constrain(x, "batch", "length", "act_embed"), aux


class LstmLm(nn.Module):
  """Token ids in, next-token logits out: embedding, blocks, softmax. Two blocks, the first with
  experts, are the paper.

  A token's experts depend on its own state alone, so that the mixture is applied "convolutionally":
  how many tokens are routed together (`MoeLayer.group_size`) is the batch that the balance losses
  see.

  Parameters: `embedding`, `layer_<i>` and `repeats/layer_<i>` as in `Decoder`, and `head` unless
  the embedding is tied. Deviation: the softmax is a full one, also in training (the paper samples).

  Attributes:
    vocab_size: V.
    d_model: D.
    has_experts: for each layer, whether experts follow its LSTM.
    lstm: makes the LSTM of a layer.
    moe: makes the experts of a layer; None where there is no such layer.
    num_biased_experts: E where routing is balanced by a bias, kept in the collection
      "router_state"; else 0.
    embed_scale: the embedding's rows, of standard deviation 1/sqrt(D), are multiplied by sqrt(D) on
      the way in.
    tied_embeddings: the output projection is the embedding.
    dropout: probability, on the output of every layer but the softmax.
    dtype: of the activations; parameters are float32.
    scan_layers: compile the repeating stretch of layers once (`find_pattern`).
    remat: a key of `REMAT`.
    layer_reduce: a key of `LAYER_REDUCE`: how the layers' auxiliary losses become one.
    seed: of the run, in [0, 2^32): routers that learn nothing differ by it, see
      `RoutingContext.salt`.
  """

  vocab_size: int
  d_model: int
  has_experts: Sequence[bool]
  lstm: Factory
  moe: Factory | None = None
  num_biased_experts: int = 0
  embed_scale: bool = True
  tied_embeddings: bool = False
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
    """As `Decoder`. A document begins where `positions` is 0; there the recurrent state does,
    too."""
    context = LayerContext(
      tokens, segment_ids, positions, train=train, return_routing=return_routing, micro=micro
    )
    table, x = embed(self, tokens, train)
    outside = outside_routing(self, stored, micro)
    x, aux = run_layers(self._block, self.has_experts, self.scan_layers, x, context, outside)
    return next_token_logits(self, x, table), reduce_losses(self, aux)

  def _block(self, has_experts: bool, scanned: bool) -> Factory:
    return make_block(
      self.remat,
      scanned,
      LstmBlock,
      lstm=self.lstm,
      moe=self.moe if has_experts else None,
      dropout=self.dropout,
    )
