"""The causal Transformer, with experts in chosen layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe_jax.layers import Aux, LayerContext, Microbatch
from moe_jax.layers.init import projection
from moe_jax.models.stack import LAYER_REDUCE, Factory, make_block, outside_routing, run_layers
from moe_jax.routing import RoutingPlan
from moe_jax.sharding import constrain


class Decoder(nn.Module):
  """Token ids in, next-token logits out.

  Parameters: `embedding`, `layer_<i>` for layers that are compiled singly, `repeats/layer_<i>` with
  a leading axis for those that are scanned (i counts from the first repeat), `final_norm`, and
  `head` unless the embedding is tied.

  The embedding begins with standard deviation 1/sqrt(D), and its rows are multiplied by sqrt(D) on
  the way in (Vaswani et al. 2017, Sec. 3.4): the residual stream begins with unit variance, and so
  do tied logits, except that of the token just read, which begins near sqrt(D) and makes the first
  loss exceed ln V. Without `embed_scale`, as in LLaMA and the open models after it, nothing is
  multiplied, and the stream begins with standard deviation 1/sqrt(D): 0.022 at D = 2048 and 0.016
  at 4096, where published code has 0.02 at all widths (DeepSeek 0.006).

  Parameter `relative_bias`, where all layers share one table of relative biases.

  Attributes:
    vocab_size: V.
    d_model: D.
    has_experts: for each layer, whether its FFN is `moe` or `dense`.
    attention: makes the attention of a layer.
    dense: makes the FFN of a layer without experts.
    moe: makes the FFN of a layer with experts; None where there is no such layer.
    bias_table: makes the one table of relative biases that all layers share, as a parameter of the
      module given; None: each layer has its own, or there are none.
    norm: makes a normalisation.
    extra_ffn: in layers with experts, a `dense` FFN of its own norm and residual comes right before
      them (ST-MoE).
    num_biased_experts: E where routing is balanced by a bias, kept in the collection
      "router_state"; else 0.
    embed_scale: the embedding's rows are multiplied by sqrt(D) on the way in.
    tied_embeddings: the output projection is the embedding.
    dropout: probability, on the output of each sublayer and of the embedding.
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
  attention: Factory
  dense: Factory
  norm: Factory
  moe: Factory | None = None
  bias_table: Callable[[nn.Module], Array] | None = None
  extra_ffn: bool = False
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
    """Float32 logits of the token after each token; the layers' losses (one number each) and
    metrics ([Lm, ...]).

    Args:
      tokens: vocabulary ids.
      segment_ids: document of each token within its row, from 1; 0 is padding, whose logits mean
        nothing.
      positions: place of each token in its document, from 0.
      train: dropout and routing noise on, from the RNG streams "dropout" and "router".
      return_routing: adds the metrics "top1_expert" [Lm, B, L] and "plan", a RoutingPlan of [Lm, G,
        A] arrays.
      stored: such a plan, of the same tokens, to follow instead of the routers'
        (`routing/replay.py`).
      micro: the rows are a microbatch's; losses are then its parts of the batch's.
    """
    context = LayerContext(
      tokens,
      segment_ids,
      positions,
      train=train,
      return_routing=return_routing,
      micro=micro,
      bias_table=self.bias_table and self.bias_table(self),
    )
    table, x = embed(self, tokens, train)
    outside = outside_routing(self, stored, micro)
    x, aux = run_layers(self._block, self.has_experts, self.scan_layers, x, context, outside)
    return next_token_logits(self, self.norm(name="final_norm")(x), table), reduce_losses(self, aux)

  def _block(self, has_experts: bool, scanned: bool) -> Factory:
    return make_block(
      self.remat,
      scanned,
      attention=self.attention,
      ffn=self.moe if has_experts else self.dense,
      norm=self.norm,
      extra=self.dense if has_experts and self.extra_ffn else None,
      dropout=self.dropout,
    )


def embed(
  model: nn.Module, tokens: Int[Array, "B L"], train: bool
) -> tuple[Float[Array, "V D"], Float[Array, "B L D"]]:
  """The parameter `embedding` of a model that has `Decoder`'s fields, and what its first layer
  reads of it."""
  normal = nn.with_logical_partitioning(
    nn.initializers.normal(model.d_model**-0.5), ("vocab", "embed")
  )
  table = model.param("embedding", normal, (model.vocab_size, model.d_model), jnp.float32)
  x = jnp.take(table, tokens, axis=0).astype(model.dtype)
  x = x * math.sqrt(model.d_model) if model.embed_scale else x
  return table, nn.Dropout(model.dropout, deterministic=not train)(
    constrain(x, "batch", "length", "act_embed")
  )


def next_token_logits(
  model: nn.Module, x: Float[Array, "B L D"], table: Float[Array, "V D"]
) -> Float[Array, "B L V"]:
  """Float32 logits of what such a model made last, by the embedding or by a `head`."""
  head = (
    table.astype(model.dtype).T
    if model.tied_embeddings
    else projection(
      model,
      "head",
      (model.d_model, model.vocab_size),
      ("embed", "vocab"),
      fan_in=model.d_model,
      dtype=model.dtype,
    )
  )
  return constrain(
    jnp.einsum("bld,dv->blv", x, head, preferred_element_type=jnp.float32),
    "batch",
    "length",
    "act_vocab",
  )


def reduce_losses(model: nn.Module, aux: Aux) -> Aux:
  """With one number a loss in place of one for each layer with experts."""
  return aux.replace(
    losses={
      name: LAYER_REDUCE[model.layer_reduce](by_layer) for name, by_layer in aux.losses.items()
    }
  )


def update_router_state(
  router_state: Mapping[str, Array], assigned: Int[Array, "Lm E"], rate: float
) -> Mapping[str, Array]:
  """One step of loss-free balancing (arXiv 2408.15664, Algorithm 1): b += rate * sign(mean load -
  load).

  Args:
    router_state: the collection "router_state": {"bias": [Lm, E]}; an empty one stays empty.
    assigned: how many assignments of the whole batch name each expert, over all devices and
      microbatches. Counts are exact: an expert of mean load keeps its bias, whereas shares would
      round to either side of their mean.
    rate: u, in units of probability.
  """
  if not router_state:
    return router_state
  # mean - count has the sign of (whole part of the mean) - count, or where this is 0, of the rest.
  # Counts times E, or counts in float32, could be too large to be exact.
  whole, rest = jnp.divmod(jnp.sum(assigned, axis=-1, keepdims=True), assigned.shape[-1])
  sign = jnp.sign(whole - assigned) + ((whole == assigned) & (rest > 0))
  return {"bias": router_state["bias"] + rate * sign}
