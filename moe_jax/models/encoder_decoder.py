"""The encoder-decoder Transformer (Vaswani et al. 2017; T5, arXiv 1910.10683), with experts in
chosen layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe_jax.layers import Aux, LayerContext, LayerRouting, Microbatch, concatenate
from moe_jax.layers.init import projection
from moe_jax.models.language_model import reduce_losses
from moe_jax.models.stack import Factory, outside_routing, rows, run_layers
from moe_jax.routing import RoutingPlan
from moe_jax.sharding import constrain

SOURCE = ("tokens", "segment_ids", "positions")  # what an encoder reads
BY_TOKEN = ("top1_expert", "plan")  # metrics whose shape depends on the number of tokens


class Tower(nn.Module):
  """Layers and a norm: an encoder or, where its layers attend to one, a decoder.

  Parameters: layers named as `LanguageModel` names its own, `final_norm`, and `relative_bias` where
  the self-attentions of all layers share one table of relative biases (T5).

  Attributes:
    has_experts: For each layer, whether it has experts.
    block: (whether the layer has experts, whether it is scanned) -> factory of the layer.
    norm: Makes the last normalisation.
    bias_table: See `LanguageModel`.
    dropout: Probability of dropout on the input and on the output of the last norm.
    scan_layers: Whether the repeating stretch of layers is compiled once (`find_pattern`).
  """

  has_experts: Sequence[bool]
  block: Callable[[Hashable, bool], Factory]
  norm: Factory
  bias_table: Callable[[nn.Module], Array] | None = None
  dropout: float = 0.0
  scan_layers: bool = True

  @nn.compact
  def __call__(
    self, x: Float[Array, "B L D"], context: LayerContext, routing: LayerRouting
  ) -> tuple[Float[Array, "B L D"], Aux]:
    def drop(y):
      return nn.Dropout(self.dropout, deterministic=not context.train)(y)

    context = context.replace(bias_table=self.bias_table and self.bias_table(self))
    x, aux = run_layers(self.block, self.has_experts, self.scan_layers, drop(x), context, routing)
    return drop(self.norm(name="final_norm")(x)), aux


class EncoderDecoder(nn.Module):
  """A source's token ids and a target's in, logits of the target's next tokens out.

  Parameters: `embedding`, `target_embedding` if there is one, `encoder/...` and `decoder/...`,
  which are `Tower`s, and `head` unless the embedding is tied.

  Rows of the embedding are either of standard deviation 1/sqrt(D), multiplied by sqrt(D) on the way
  in (Vaswani et al. 2017, Sec. 3.4), or of standard deviation 1 and, where they are tied to the
  output, divided by sqrt(D) there (T5). At the start the two are the same function. Adam, whose
  steps do not depend on a weight's size, then trains them differently; Adafactor, whose steps are
  in proportion to it, does not.

  Attributes:
    vocab_size: V, of the source and, without `target_vocab_size`, of the target.
    d_model: D.
    encoder_experts: for each layer of the encoder, whether it has experts.
    decoder_experts: for each layer of the decoder.
    encoder: makes a `Tower` of given `has_experts` whose attention is not causal.
    decoder: makes one with a causal self-attention and a `cross`.
    target_vocab_size: of an embedding of the target's own (GShard has 64k and 32k entries); 0: the
      two share one.
    num_biased_experts: E where routing is balanced by a bias, kept in the collection
      "router_state"; else 0.
    embed_scale: the first of the two ways above.
    tied_embeddings: the output projection is the target's embedding.
    dtype: of the activations; parameters are float32.
    layer_reduce: a key of `LAYER_REDUCE`: how the layers' auxiliary losses become one.
    seed: of the run, in [0, 2^32): routers that learn nothing differ by it, see
      `RoutingContext.salt`.
  """

  vocab_size: int
  d_model: int
  encoder_experts: Sequence[bool]
  decoder_experts: Sequence[bool]
  encoder: Factory
  decoder: Factory
  target_vocab_size: int = 0
  num_biased_experts: int = 0
  embed_scale: bool = True
  tied_embeddings: bool = True
  dtype: DTypeLike = jnp.float32
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
    stored: Mapping[str, RoutingPlan] | None = None,
    encoder: Mapping[str, Int[Array, "B M"]] | None = None,
    micro: Microbatch | None = None,
  ) -> tuple[Float[Array, "B L V"], Aux]:
    """Float32 logits of the target's token after each one given; losses (one number each) and
    metrics ([Lm, ...]).

    The layers with experts are counted through, the encoder's first.

    Args:
      tokens: the target's, shifted right by one.
      segment_ids: which pair of source and target a token belongs to within its row, from 1; 0 is
        padding, whose logits mean nothing. A target sees the source of its own segment.
      positions: place of each token in its target, from 0.
      train: dropout and routing noise on, from the RNG streams "dropout" and "router".
      return_routing: adds the decoder's metrics "top1_expert" [Lm, B, L] and "plan", a RoutingPlan
        of [Lm, G, A] arrays, and the encoder's, likewise, "encoder_top1_expert" and "encoder_plan".
      stored: such plans of the same tokens to follow, {"encoder": plan, "decoder": plan} or one of
        them.
      encoder: {"tokens", "segment_ids", "positions"} of the source. While initialising, the target
        stands in for a missing one: no parameter's shape depends on it.
      micro: the rows are a microbatch's; losses are then its parts of the batch's.

    Raises:
      ValueError: `encoder` or one of its entries is missing.
    """
    if encoder is None and self.is_initializing():
      encoder = dict(zip(SOURCE, (tokens, segment_ids, positions), strict=True))
    missing = [name for name in SOURCE if name not in (encoder or {})]
    if missing:
      raise ValueError(
        f"encoder: {', '.join(missing)} missing; an encoder-decoder needs the source's {SOURCE}"
      )
    table, target = self._tables()
    source = micro and micro.replace(tokens=micro.encoder_tokens)
    context = LayerContext(
      *(encoder[name] for name in SOURCE), train=train, return_routing=return_routing, micro=source
    )
    first, second = self._routing(stored or {}, micro)
    memory, read = self.encoder(self.encoder_experts, name="encoder")(
      self._embed(table, encoder["tokens"]), context, first
    )
    context = LayerContext(
      tokens,
      segment_ids,
      positions,
      train=train,
      return_routing=return_routing,
      memory=memory,
      memory_segments=encoder["segment_ids"],
      micro=micro,
    )
    x, written = self.decoder(self.decoder_experts, name="decoder")(
      self._embed(target, tokens), context, second
    )
    aux = _join(read, written)
    return self._logits(x, target), reduce_losses(aux, self.layer_reduce)

  @property
  def has_experts(self) -> tuple[bool, ...]:
    """Of the encoder's layers, then of the decoder's."""
    return (*self.encoder_experts, *self.decoder_experts)

  def _tables(self) -> tuple[Float[Array, "V D"], Float[Array, "W D"]]:
    """The source's embedding and the target's, which may be the same."""
    normal = nn.initializers.normal(self.d_model**-0.5 if self.embed_scale else 1.0)

    def table(name, size):
      return self.param(
        name,
        nn.with_logical_partitioning(normal, ("vocab", "embed")),
        (size, self.d_model),
        jnp.float32,
      )

    source = table("embedding", self.vocab_size)
    return source, table(
      "target_embedding", self.target_vocab_size
    ) if self.target_vocab_size else source

  def _embed(self, table: Float[Array, "V D"], tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    x = jnp.take(table, tokens, axis=0).astype(self.dtype)
    return constrain(
      x * math.sqrt(self.d_model) if self.embed_scale else x, "batch", "length", "act_embed"
    )

  def _logits(self, x: Float[Array, "B L D"], target: Float[Array, "V D"]) -> Float[Array, "B L V"]:
    if not self.tied_embeddings:
      head = projection(
        self,
        "head",
        (self.d_model, len(target)),
        ("embed", "vocab"),
        fan_in=self.d_model,
        dtype=self.dtype,
      )
    else:
      head = target.astype(self.dtype).T
      x = x if self.embed_scale else x * self.d_model**-0.5
    logits = jnp.einsum("bld,dv->blv", x, head, preferred_element_type=jnp.float32)
    return constrain(logits, "batch", "length", "act_vocab")

  def _routing(
    self, stored: Mapping[str, RoutingPlan], micro: Microbatch | None
  ) -> tuple[LayerRouting, LayerRouting]:
    """What comes to the encoder's and to the decoder's layers with experts from outside."""
    own, encoder = outside_routing(self, micro=micro), sum(self.encoder_experts)
    return (
      rows(own, slice(0, encoder)).replace(stored=stored.get("encoder")),
      rows(own, slice(encoder, None)).replace(stored=stored.get("decoder")),
    )


def _join(encoder: Aux, decoder: Aux) -> Aux:
  """The Aux of both stacks, the encoder's layers first; what has a place for each token is not
  joined, but renamed."""

  def by_layer(aux):
    return aux.replace(metrics={k: v for k, v in aux.metrics.items() if k not in BY_TOKEN})

  joined = concatenate([by_layer(encoder), by_layer(decoder)])
  apart = {f"encoder_{name}": encoder.metrics[name] for name in BY_TOKEN if name in encoder.metrics}
  apart |= {name: decoder.metrics[name] for name in BY_TOKEN if name in decoder.metrics}
  return joined.replace(metrics=joined.metrics | apart)
