"""The language model: an embedding, layers of any kind, and an output projection to logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe_jax.layers import Aux, Cached, LayerContext, Microbatch
from moe_jax.layers.init import parameter, projection
from moe_jax.models.output import Nats, output
from moe_jax.models.stack import LAYER_REDUCE, Factory, outside_routing, run_layers
from moe_jax.routing import RoutingPlan
from moe_jax.sharding import constrain


class LanguageModel(nn.Module):
  """Maps token ids to logits of the next token.

  The layers are those that `block` makes: the layers of a causal Transformer (`transformer_block`),
  LSTMs with experts between them (`lstm_block`), or the sublayers of a Brainformer
  (`sublayer_block`).

  Parameters: `embedding`, `layer_<i>` for layers that are compiled singly, `repeats/layer_<i>` with
  a leading axis for layers that are scanned (i counts from the first scanned layer), `final_norm`
  if there is one, `head` unless the embedding is tied, and `relative_bias` if all layers share one
  table of relative biases.

  The embedding starts with standard deviation 1/sqrt(D), and its rows are multiplied by sqrt(D) on
  the way in (Vaswani et al. 2017, Sec. 3.4). The residual stream therefore starts with unit
  variance, and so do tied logits, except that of the token just read, which starts near sqrt(D) and
  makes the first loss exceed ln V. Without `embed_scale`, as in LLaMA and the open models after it,
  nothing is multiplied, and the stream starts with standard deviation 1/sqrt(D). This is 0.022 at
  D = 2048 and 0.016 at D = 4096, where published code has 0.02 at all widths (DeepSeek 0.006).

  Attributes:
    vocab_size: Vocabulary size V.
    d_model: Model width D.
    has_experts: For each layer, whether it has experts.
    block: (kind of the layer, whether it is scanned) -> factory of the layer.
    kinds: For each layer, its kind. Layers of one kind are alike. None means that the kind is
      whether the layer has experts.
    final_norm: Makes the normalisation before the logits; None means that there is none.
    bias_table: Makes the one table of relative biases that all layers share, as a parameter of the
      module that it is given. None means that each layer has its own table, or that there is none.
    gate_residual: Whether routers read the logits of the layer with experts before (MoE++).
    num_experts: Number of experts E from which the router of each layer with experts chooses, with
      those that have no FFN.
    balancing_state: Names of the arrays [Lm, E] of loss-free balancing, which are kept in the
      collection "router_state". Without any, there is no bias.
    embed_scale: Whether the embedding's rows are multiplied by sqrt(D) on the way in.
    tied_embeddings: Whether the output projection is the embedding.
    dropout: Probability of dropout on the embedding's output.
    dtype: Dtype of the activations. Parameters are float32.
    logits_chunk: See `output`; entries of the vocabulary whose logits exist at the same time.
    scan_layers: Whether the repeating stretch of layers is compiled once (`find_pattern`).
    layer_reduce: A key of `LAYER_REDUCE`: how the layers' auxiliary losses become one.
    seed: Seed of the run, in [0, 2^32). Routers that learn nothing differ by it; see
      `RoutingContext.salt`.
  """

  vocab_size: int
  d_model: int
  has_experts: Sequence[bool]
  block: Callable[[Hashable, bool], Factory]
  kinds: Sequence[Hashable] | None = None
  final_norm: Factory | None = None
  bias_table: Callable[[nn.Module], Array] | None = None
  gate_residual: bool = False
  num_experts: int = 0
  balancing_state: Sequence[str] = ()
  embed_scale: bool = True
  tied_embeddings: bool = True
  dropout: float = 0.0
  dtype: DTypeLike = jnp.float32
  logits_chunk: int = 0
  scan_layers: bool = True
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
    cached: Cached | None = None,
    dropless: bool = False,
    targets: Int[Array, "B L"] | None = None,
  ) -> tuple[Float[Array, "B _ V"] | Nats, Aux]:
    """Returns float32 logits of the token after each token, and what the layers report.

    The Aux has one number for each loss, and metrics of shape [Lm, ...] for Lm layers with experts.

    Args:
      tokens: Vocabulary ids.
      segment_ids: Document of each token within its row, from 1; 0 is padding, whose logits mean
        nothing.
      positions: Place of each token in its document, from 0. The state of an LSTM starts anew where
        it is 0.
      train: Whether dropout and routing noise are on, from the RNG streams "dropout" and "router".
      return_routing: Adds the metrics "top1_expert" [Lm, B, L], "plan", a RoutingPlan of
        [Lm, G, A] arrays, and "probabilities" [Lm, B, L, E], those that the balance loss averages
        (`model.moe.balance_scores`). Where layers route differently, shorter plans are filled up
        with assignments to nobody. Soft MoE has the first of them only.
      stored: Such a plan, of the same tokens, to follow instead of the routers' own
        (`routing/replay.py`).
      micro: The place of a microbatch in its batch. Losses are then its parts of the batch's.
      cached: The places of the tokens in rows whose beginning was read by earlier calls. The call
        must make the collection "cache" mutable, and the logits are those after the last token,
        [B, 1, V].
      dropless: See `LayerContext`; `cached` implies it.
      targets: The token that each position should predict. With them, the result has `(nats,
        log Z)` of each position in place of logits, as `token_nats` returns them.
    """
    context = LayerContext(
      tokens,
      segment_ids,
      positions,
      train=train,
      return_routing=return_routing,
      micro=micro,
      bias_table=self.bias_table and self.bias_table(self),
      cached=cached,
      dropless=dropless or cached is not None,
    )
    if self.gate_residual:
      context = context.replace(before=jnp.zeros((*tokens.shape, self.num_experts)))
    table, x = self._embed(tokens, train)
    outside = outside_routing(self, stored, micro)
    x, aux = run_layers(
      self.block, self.has_experts, self.scan_layers, x, context, outside, kinds=self.kinds
    )
    if cached is not None:
      x = x[:, -1:]
    if self.final_norm is not None:
      x = self.final_norm(name="final_norm")(x)
    return self._output(x, table, targets), reduce_losses(aux, self.layer_reduce)

  def _embed(
    self, tokens: Int[Array, "B L"], train: bool
  ) -> tuple[Float[Array, "V D"], Float[Array, "B L D"]]:
    """Returns the parameter `embedding`, and the first layer's input."""
    normal = nn.initializers.normal(self.d_model**-0.5)
    shape, axes = (self.vocab_size, self.d_model), ("vocab", "embed")
    table = parameter(self, "embedding", normal, shape, axes)
    x = jnp.take(table, tokens, axis=0).astype(self.dtype)
    x = x * math.sqrt(self.d_model) if self.embed_scale else x
    x = constrain(x, "batch", "length", "act_embed")
    return table, nn.Dropout(self.dropout, deterministic=not train)(x)

  def _output(
    self, x: Float[Array, "B L D"], table: Float[Array, "V D"], targets: Int[Array, "B L"] | None
  ) -> Float[Array, "B L V"] | Nats:
    """Returns `output`, which projects by the embedding or by the parameter `head`."""
    if self.tied_embeddings:
      head = table.astype(self.dtype).T
    else:
      shape, axes = (self.d_model, self.vocab_size), ("embed", "vocab")
      head = projection(self, "head", shape, axes, fan_in=self.d_model, dtype=self.dtype)
    return output(x, head, targets, self.logits_chunk)


def reduce_losses(aux: Aux, layer_reduce: str) -> Aux:
  """Returns `aux` with one number for each loss in place of one for each layer with experts."""
  reduce = LAYER_REDUCE[layer_reduce]
  return aux.replace(losses={name: reduce(by_layer) for name, by_layer in aux.losses.items()})
