"""The encoder-decoder Transformer (Vaswani et al. 2017; T5, arXiv 1910.10683).

Any of its layers may have experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe_jax.layers import Aux, Cached, LayerContext, LayerRouting, Microbatch, concatenate
from moe_jax.layers.init import parameter, projection
from moe_jax.models.language_model import reduce_losses
from moe_jax.models.output import Nats, output
from moe_jax.models.stack import Factory, outside_routing, rows, run_layers
from moe_jax.routing import RoutingPlan
from moe_jax.sharding import constrain

SOURCE = ("tokens", "segment_ids", "positions")  # what an encoder reads
# Metrics whose shape depends on the number of tokens.
BY_TOKEN = ("top1_expert", "plan", "probabilities")


class Tower(nn.Module):
  """A stack of layers and a final norm: an encoder, or a decoder if its layers attend to a memory.

  Parameters: the layers, which are named as in `LanguageModel`, `final_norm`, and `relative_bias`
  if the self-attentions of all layers share one table of relative biases (T5).

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
    """Returns the normalised output of the last layer, and what the layers report."""

    def drop(y):
      return nn.Dropout(self.dropout, deterministic=not context.train)(y)

    context = context.replace(bias_table=self.bias_table and self.bias_table(self))
    x, aux = run_layers(self.block, self.has_experts, self.scan_layers, drop(x), context, routing)
    return drop(self.norm(name="final_norm")(x)), aux


class EncoderDecoder(nn.Module):
  """Maps the token ids of a source and of a target to logits of the target's next tokens.

  Parameters: `embedding`, `target_embedding` if there is one, `encoder/...` and `decoder/...`,
  which are `Tower`s, and `head` unless the embedding is tied.

  With `embed_scale`, the embedding starts with standard deviation 1/sqrt(D), and its rows are
  multiplied by sqrt(D) on the way in (Vaswani et al. 2017, Sec. 3.4). Without it, the embedding
  starts with standard deviation 1, and tied logits are divided by sqrt(D) (T5). The two are the
  same function at initialisation. Adam, whose steps do not depend on the size of a weight, then
  trains them differently; Adafactor, whose steps are proportional to it, does not.

  Attributes:
    vocab_size: Vocabulary size V of the source and, without `target_vocab_size`, of the target.
    d_model: Model width D.
    encoder_experts: For each layer of the encoder, whether it has experts.
    decoder_experts: For each layer of the decoder, whether it has experts.
    encoder: Makes a `Tower` from its `has_experts`, with attention that is not causal.
    decoder: Makes a `Tower` from its `has_experts`, with causal self-attention and with attention
      to the encoder's output.
    target_vocab_size: Vocabulary size of a separate embedding for the target (GShard has 64k and
      32k entries). 0 means that source and target share one embedding.
    num_experts: Number of experts E from which the router of each layer with experts chooses, with
      those that have no FFN.
    balancing_state: Names of the arrays [Lm, E] of loss-free balancing, which are kept in the
      collection "router_state". Without any, there is no bias.
    embed_scale: Whether the embedding's rows are multiplied by sqrt(D) on the way in; see above.
    tied_embeddings: Whether the output projection is the target's embedding.
    dtype: Dtype of the activations. Parameters are float32.
    logits_chunk: See `output`; entries of the vocabulary whose logits exist at the same time.
    layer_reduce: A key of `LAYER_REDUCE`: how the layers' auxiliary losses become one.
    seed: Seed of the run, in [0, 2^32). Routers that learn nothing differ by it; see
      `RoutingContext.salt`.
  """

  vocab_size: int
  d_model: int
  encoder_experts: Sequence[bool]
  decoder_experts: Sequence[bool]
  encoder: Factory
  decoder: Factory
  target_vocab_size: int = 0
  num_experts: int = 0
  balancing_state: Sequence[str] = ()
  embed_scale: bool = True
  tied_embeddings: bool = True
  dtype: DTypeLike = jnp.float32
  logits_chunk: int = 0
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
    cached: Cached | None = None,
    dropless: bool = False,
    targets: Int[Array, "B L"] | None = None,
  ) -> tuple[Float[Array, "B _ V"] | Nats, Aux]:
    """Returns float32 logits of the target's token after each token, and what the layers report.

    The Aux has one number for each loss, and metrics of shape [Lm, ...] for the Lm layers with
    experts, of which the encoder's come first.

    Args:
      tokens: Vocabulary ids of the target, shifted right by one.
      segment_ids: Pair of source and target that each token belongs to within its row, from 1; 0 is
        padding, whose logits mean nothing. A target sees the source of its own segment.
      positions: Place of each token in its target, from 0.
      train: Whether dropout and routing noise are on, from the RNG streams "dropout" and "router".
      return_routing: Adds the decoder's metrics of each token, see `LanguageModel`, and the
        encoder's with the prefix "encoder_", as in "encoder_top1_expert".
      stored: Such plans of the same tokens to follow: {"encoder": plan, "decoder": plan}, or only
        one of them.
      encoder: The arrays "tokens", "segment_ids" and "positions" of the source. During
        initialisation the target stands in for a missing source, because no parameter's shape
        depends on it.
      micro: The place of a microbatch in its batch. Losses are then its parts of the batch's.
      cached: The places of the target's tokens in rows whose beginning was read by earlier calls;
        see `LanguageModel`. The first call needs `encoder`, and later ones read what that call kept
        of the source in the collection "cache".
      dropless: See `LayerContext`; `cached` implies it, for the encoder, too.
      targets: The token that each position should predict; see `LanguageModel`.

    Raises:
      ValueError: `encoder` or one of its entries is missing.
    """
    dropless = dropless or cached is not None
    if encoder is None and self.is_initializing():
      encoder = dict(zip(SOURCE, (tokens, segment_ids, positions), strict=True))
    source_table, target_table = self._tables()
    encoder_routing, decoder_routing = self._routing(stored or {}, micro)
    memory, encoder_aux = None, Aux()
    if encoder is None and self.has_variable("cache", "memory_segments"):
      memory_segments = self.get_variable("cache", "memory_segments")
    else:
      source = encoder or {}
      missing = [name for name in SOURCE if name not in source]
      if missing:
        raise ValueError(
          f"encoder: {', '.join(missing)} missing; an encoder-decoder needs the source's {SOURCE}"
        )
      # The encoder's losses are weighted by the number of its own tokens.
      source_micro = micro and micro.replace(tokens=micro.encoder_tokens)
      context = LayerContext(
        *(source[name] for name in SOURCE),
        train=train,
        return_routing=return_routing,
        micro=source_micro,
        dropless=dropless,
      )
      memory, encoder_aux = self.encoder(self.encoder_experts, name="encoder")(
        self._embed(source_table, source["tokens"]), context, encoder_routing
      )
      memory_segments = source["segment_ids"]
      if cached is not None:
        self.put_variable("cache", "memory_segments", memory_segments)
    context = LayerContext(
      tokens,
      segment_ids,
      positions,
      train=train,
      return_routing=return_routing,
      memory=memory,
      memory_segments=memory_segments,
      micro=micro,
      cached=cached,
      dropless=dropless,
    )
    x, decoder_aux = self.decoder(self.decoder_experts, name="decoder")(
      self._embed(target_table, tokens), context, decoder_routing
    )
    aux = reduce_losses(_join(encoder_aux, decoder_aux), self.layer_reduce)
    return self._output(x if cached is None else x[:, -1:], target_table, targets), aux

  @property
  def has_experts(self) -> tuple[bool, ...]:
    """Whether each layer has experts, first those of the encoder and then those of the decoder."""
    return (*self.encoder_experts, *self.decoder_experts)

  def _tables(self) -> tuple[Float[Array, "V D"], Float[Array, "W D"]]:
    """Returns the embedding of the source and that of the target, which may be the same."""
    normal = nn.initializers.normal(self.d_model**-0.5 if self.embed_scale else 1.0)

    def table(name, size):
      return parameter(self, name, normal, (size, self.d_model), ("vocab", "embed"))

    source = table("embedding", self.vocab_size)
    if not self.target_vocab_size:
      return source, source
    return source, table("target_embedding", self.target_vocab_size)

  def _embed(self, table: Float[Array, "V D"], tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    """Returns the input of the first layer."""
    x = jnp.take(table, tokens, axis=0).astype(self.dtype)
    return constrain(
      x * math.sqrt(self.d_model) if self.embed_scale else x, "batch", "length", "act_embed"
    )

  def _output(
    self, x: Float[Array, "B L D"], table: Float[Array, "V D"], targets: Int[Array, "B L"] | None
  ) -> Float[Array, "B L V"] | Nats:
    """Returns `output`, which projects by the target's embedding `table` or by `head`."""
    if not self.tied_embeddings:
      head = projection(
        self,
        "head",
        (self.d_model, len(table)),
        ("embed", "vocab"),
        fan_in=self.d_model,
        dtype=self.dtype,
      )
    else:
      head = table.astype(self.dtype).T
      # Rows of standard deviation 1 would give logits of standard deviation sqrt(D).
      x = x if self.embed_scale else x * self.d_model**-0.5
    return output(x, head, targets, self.logits_chunk)

  def _routing(
    self, stored: Mapping[str, RoutingPlan], micro: Microbatch | None
  ) -> tuple[LayerRouting, LayerRouting]:
    """Returns the outside routing inputs of the encoder's and of the decoder's layers."""
    routing, num_encoder = outside_routing(self, micro=micro), sum(self.encoder_experts)
    return (
      rows(routing, slice(0, num_encoder)).replace(stored=stored.get("encoder")),
      rows(routing, slice(num_encoder, None)).replace(stored=stored.get("decoder")),
    )


def _join(encoder: Aux, decoder: Aux) -> Aux:
  """Returns the Aux of both stacks, with the encoder's layers first.

  Metrics with an entry for each token cannot be concatenated, because source and target have
  different lengths. They are kept apart, and the encoder's get the prefix "encoder_".
  """

  def by_layer(aux):
    return aux.replace(metrics={k: v for k, v in aux.metrics.items() if k not in BY_TOKEN})

  joined = concatenate([by_layer(encoder), by_layer(decoder)])
  by_token = {
    f"encoder_{name}": encoder.metrics[name] for name in BY_TOKEN if name in encoder.metrics
  }
  by_token |= {name: decoder.metrics[name] for name in BY_TOKEN if name in decoder.metrics}
  return joined.replace(metrics=joined.metrics | by_token)
