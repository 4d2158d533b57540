"""The causal Transformer, with experts in chosen layers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe_jax.layers import Aux, LayerContext, LayerRouting, concatenate, stack
from moe_jax.layers.init import projection
from moe_jax.models.pattern import Pattern, find_pattern
from moe_jax.routing import RoutingPlan
from moe_jax.sharding import constrain

Factory = Callable[..., nn.Module]  # takes a name, returns a module

# What a rematerialised layer keeps for its backward pass besides its input. None: nothing is recomputed.
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # products with weights; not attention scores
}

LAYER_REDUCE = {"mean": jnp.mean, "sum": jnp.sum}


class Block(nn.Module):
  """x + attention(norm(x)), then x + ffn(norm(x)): pre-norm (Xiong et al. 2020), dropout on each addition."""

  attention: Factory
  ffn: Factory  # dense or experts: (x, context, routing) -> (y, Aux)
  norm: Factory
  dropout: float = 0.0

  @nn.compact
  def __call__(self, x: Float[Array, "B L D"], context: LayerContext,
               routing: LayerRouting | None = None) -> tuple[Float[Array, "B L D"], Aux]:
    drop = lambda y: nn.Dropout(self.dropout, deterministic=not context.train)(y)
    x = x + drop(self.attention(name="attention")(self.norm(name="attention_norm")(x), context))
    y, aux = self.ffn(name="ffn")(self.norm(name="ffn_norm")(x), context, routing)
    return constrain(x + drop(y), "batch", "length", "act_embed"), aux


class Stack(nn.Module):
  """Blocks one after the other, with their Aux stacked: the body of the scan.

  Attributes:
    blocks: factories of the blocks, which are named layer_0, layer_1, ...
    has_experts: which of them have experts; they take the rows of `routing` in order.
  """

  blocks: Sequence[Factory]
  has_experts: Sequence[bool]

  @nn.compact
  def __call__(self, x: Float[Array, "B L D"], context: LayerContext,
               routing: LayerRouting) -> tuple[Float[Array, "B L D"], Aux]:
    auxes = []
    for i, (make, has_experts) in enumerate(zip(self.blocks, self.has_experts, strict=True)):
      own = _rows(routing, sum(self.has_experts[:i])) if has_experts else None
      x, aux = make(name=f"layer_{i}")(x, context, own)
      auxes.append(aux)
    return x, stack(auxes)


class Decoder(nn.Module):
  """Token ids in, next-token logits out.

  Parameters: `embedding`, `layer_<i>` for layers that are compiled singly, `repeats/layer_<i>` with a leading axis for
  those that are scanned (i counts from the first repeat), `final_norm`, and `head` unless the embedding is tied.

  The embedding begins with standard deviation 1/sqrt(D), and its rows are multiplied by sqrt(D) on the way in
  (Vaswani et al. 2017, Sec. 3.4): the residual stream begins with unit variance, and so do tied logits, except that of
  the token just read, which begins near sqrt(D) and makes the first loss exceed ln V.

  Attributes:
    vocab_size: V.
    d_model: D.
    has_experts: for each layer, whether its FFN is `moe` or `dense`.
    attention: makes the attention of a layer.
    dense: makes the FFN of a layer without experts.
    moe: makes the FFN of a layer with experts; None where there is no such layer.
    norm: makes a normalisation.
    num_biased_experts: E where routing is balanced by a bias, kept in the collection "router_state"; else 0.
    tied_embeddings: the output projection is the embedding.
    dropout: probability, on the output of each sublayer and of the embedding.
    dtype: of the activations; parameters are float32.
    scan_layers: compile the repeating stretch of layers once (`find_pattern`).
    remat: a key of `REMAT`.
    layer_reduce: a key of `LAYER_REDUCE`: how the layers' auxiliary losses become one.
  """

  vocab_size: int
  d_model: int
  has_experts: Sequence[bool]
  attention: Factory
  dense: Factory
  norm: Factory
  moe: Factory | None = None
  num_biased_experts: int = 0
  tied_embeddings: bool = True
  dropout: float = 0.0
  dtype: DTypeLike = jnp.float32
  scan_layers: bool = True
  remat: str = "none"
  layer_reduce: str = "mean"

  @nn.compact
  def __call__(self, tokens: Int[Array, "B L"], segment_ids: Int[Array, "B L"], positions: Int[Array, "B L"], *,
               train: bool, return_routing: bool = False, stored: RoutingPlan | None = None
               ) -> tuple[Float[Array, "B L V"], Aux]:
    """Float32 logits of the token after each token; the layers' losses (one number each) and metrics ([Lm, ...]).

    Args:
      tokens: vocabulary ids.
      segment_ids: document of each token within its row, from 1; 0 is padding, whose logits mean nothing.
      positions: place of each token in its document, from 0.
      train: dropout and routing noise on, from the RNG streams "dropout" and "router".
      return_routing: adds the metrics "top1_expert" [Lm, B, L] and "plan", a RoutingPlan of [Lm, G, A] arrays.
      stored: such a plan, of the same tokens, to follow instead of the routers' (`routing/replay.py`).
    """
    context = LayerContext(tokens, segment_ids, positions, train=train, return_routing=return_routing)
    embedding = self.param("embedding", nn.with_logical_partitioning(
        nn.initializers.normal(self.d_model ** -0.5), ("vocab", "embed")), (self.vocab_size, self.d_model), jnp.float32)
    x = jnp.take(embedding, tokens, axis=0).astype(self.dtype) * math.sqrt(self.d_model)
    x = nn.Dropout(self.dropout, deterministic=not train)(constrain(x, "batch", "length", "act_embed"))
    x, aux = self._layers(x, context, LayerRouting(self._bias(), stored))
    x = self.norm(name="final_norm")(x)
    head = embedding.astype(self.dtype).T if self.tied_embeddings else projection(
        self, "head", (self.d_model, self.vocab_size), ("embed", "vocab"), fan_in=self.d_model, dtype=self.dtype)
    logits = jnp.einsum("bld,dv->blv", x, head, preferred_element_type=jnp.float32)
    reduced = {name: LAYER_REDUCE[self.layer_reduce](by_layer) for name, by_layer in aux.losses.items()}
    return constrain(logits, "batch", "length", "act_vocab"), aux.replace(losses=reduced)

  def _layers(self, x: Float[Array, "B L D"], context: LayerContext,
              routing: LayerRouting) -> tuple[Float[Array, "B L D"], Aux]:
    """Single layers, the scanned repeats, single layers. Rows of `routing` go to layers with experts."""
    layers = range(len(self.has_experts))
    pattern = find_pattern(self.has_experts if self.scan_layers else layers)
    row = lambda layer: sum(self.has_experts[:layer])  # of the first layer with experts from `layer` on
    auxes = []
    repeats = [pattern.scanned] if pattern.repeats else []
    for layer in (*layers[:pattern.prefix], *repeats, *layers[pattern.scanned.stop:]):
      if isinstance(layer, range):
        own = _rows(routing, slice(row(layer.start), row(layer.stop)))
        own = jax.tree.map(lambda leaf: leaf.reshape(pattern.repeats, -1, *leaf.shape[1:]), own)
        x, aux = self._repeats(pattern)(x, context, own)
        auxes.append(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), aux))  # [repeats * period's Lm, ...]
      else:
        own = _rows(routing, row(layer)) if self.has_experts[layer] else None
        x, aux = self._block(self.has_experts[layer], scanned=False)(name=f"layer_{layer}")(x, context, own)
        auxes.append(stack([aux]))
    return x, concatenate(auxes)

  def _block(self, has_experts: bool, scanned: bool) -> Factory:
    policy = REMAT[self.remat]
    # Under scan, nothing can undo the recomputation, so there is no need to fence it off from the compiler.
    block = Block if policy is None else nn.remat(Block, policy=policy, prevent_cse=not scanned)
    return functools.partial(block, attention=self.attention, ffn=self.moe if has_experts else self.dense,
                             norm=self.norm, dropout=self.dropout)

  def _repeats(self, pattern: Pattern) -> nn.Module:
    has_experts = tuple(self.has_experts[pattern.prefix:pattern.prefix + pattern.period])
    scanned = nn.scan(Stack, length=pattern.repeats, in_axes=(nn.broadcast, 0), out_axes=0,
                      variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True, "router": True},
                      metadata_params={nn.PARTITION_NAME: "layers"})
    return scanned(tuple(self._block(experts, scanned=True) for experts in has_experts), has_experts, name="repeats")

  def _bias(self) -> Float[Array, "Lm E"] | None:
    """What loss-free balancing adds to the experts' scores, for each layer with experts; starts at 0."""
    if not self.num_biased_experts:
      return None
    shape = (sum(self.has_experts), self.num_biased_experts)
    return self.variable("router_state", "bias", jnp.zeros, shape, jnp.float32).value


def _rows(routing: LayerRouting, index: int | slice) -> LayerRouting:
  """The rows of some layers with experts."""
  return jax.tree.map(lambda leaf: leaf[index], routing)


def update_router_state(router_state: Mapping[str, Array], load: Float[Array, "Lm E"],
                        rate: float) -> Mapping[str, Array]:
  """One step of loss-free balancing (arXiv 2408.15664, Algorithm 1): b += rate * sign(mean load - load).

  Args:
    router_state: the collection "router_state": {"bias": [Lm, E]}; an empty one stays empty.
    load: the metric "load", over the whole batch; if it was averaged over devices or microbatches, averaged before.
    rate: u, in units of probability.
  """
  if not router_state:
    return router_state
  return {"bias": router_state["bias"] + rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)}
