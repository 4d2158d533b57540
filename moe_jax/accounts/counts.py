"""Numbers of parameters and FLOPs of a config, from the shapes of the real model."""

from __future__ import annotations

import dataclasses
import math

import jax
from flax import linen as nn

from moe_jax.assembly.experts import (
  encoder_layers,
  experts_a_token,
  global_layers,
  option,
  router_of,
)
from moe_jax.assembly.models import abstract_variables
from moe_jax.assembly.sublayers import kind, layout, own_models, sublayer_at
from moe_jax.options import Config

KINDS = (
  "embedding",
  "attention",
  "recurrence",
  "dense FFN",
  "experts",
  "router",
  "widths",
  "norms",
  "relative bias",
)


@dataclasses.dataclass(frozen=True)
class Parameter:
  """One parameter of a model.

  Attributes:
    path: The names along its path.
    axes: The names of its logical axes. The axis of stacked layers is called "layers".
    size: The number of its values.
  """

  path: tuple[str, ...]
  axes: tuple[str | None, ...]
  size: int

  @property
  def kind(self) -> str:
    """The parameter's kind, which is one of `KINDS`.

    Shared and extra FFNs count as dense FFNs, the norms of attention as norms, and an output
    projection as an embedding. "widths" are the matrices into and out of those sublayers of a
    Brainformer whose width is not that of the residual stream.
    """
    if self.path[-1] == "relative_bias":
      return "relative bias"
    if set(self.axes) <= {"norm", "layers"}:
      return "norms"
    if self.path[-1] in ("to_width", "from_width"):
      return "widths"
    if "vocab" in self.axes:
      return "embedding"
    if "expert" in self.axes:
      return "experts"
    if "router" in self.axes or self.path[-1] == "shared_gate":
      return "router"
    if "lstm" in self.path:
      return "recurrence"
    return "attention" if {"attention", "cross_attention"} & set(self.path) else "dense FFN"

  @property
  def multiplies(self) -> bool:
    """Whether it is a matrix by which tokens are multiplied; all embeddings count as such."""
    is_vector = self.path[-1].endswith(("_bias", "_gate_scale"))
    return self.kind not in ("norms", "relative bias") and not is_vector


def parameter_counts(config: Config, vocab_size: int) -> tuple[int, int]:
  """Returns the numbers of all parameters and of those that one token activates.

  They are counted in the shapes that `jax.eval_shape` gives for the real model. Of E experts a
  token activates A/S, which is K for token choice and on average the capacity factor for expert
  choice. This number may differ between the sublayers of a Brainformer. With zero-computation
  experts it is the number of a token all of whose K experts have an FFN, which is the most. The
  embedding counts in full in both numbers. So do an encoder and its decoder, which process
  different tokens of an example.

  Args:
    config: A config with all sections.
    vocab_size: The size of the tokenizer's vocabulary, which counts if model.vocab_size is 0.
  """
  total, activated, shares = 0, 0.0, _expert_shares(config)
  for leaf in parameters(config, vocab_size):
    total += leaf.size
    activated += leaf.size * (
      shares[sublayer_at(config.model, leaf.path)] if leaf.kind == "experts" else 1
    )
  return total, round(activated)


def parameters_by_kind(config: Config, vocab_size: int) -> dict[str, int]:
  """Returns the number of parameters of each of `KINDS`.

  They add up to the total of `parameter_counts`, whose arguments these are, too.
  """
  counts: dict[str, int] = {name: 0 for name in KINDS}
  for leaf in parameters(config, vocab_size):
    counts[leaf.kind] += leaf.size
  return counts


def flops_per_token(config: Config, vocab_size: int) -> float:
  """Returns the FLOPs per token of all matrix products of the forward pass.

  They are 2 for each weight that the token activates, and those of attention. Of a token that
  chooses zero-computation experts they are an upper bound (see `parameter_counts`). A token is one
  of the data.seq_len positions of a row. In an encoder-decoder these are the positions of the
  decoder, and the work on the data.encoder_len positions of the encoder is divided among them. That
  work includes the keys and values of cross-attention.

  Attention counts scores and weighted averages of values, over all positions that the last query of
  a row can see: 4 L H P per layer, or 2 L H (nope + rope + value) for latent attention. Embedding
  look-ups, dispatch, norms and softmaxes do not count. Training costs about three times as much.
  """
  m = config.model
  # Embeddings that are only looked up, and not used as output projection, too.
  lookups = {"embedding"} if not m.tied_embeddings or m.target_vocab_size else set()
  lookups |= {"target_embedding"} if not m.tied_embeddings else set()
  # Positions of the encoder per position of the decoder.
  encoder_ratio = config.data.encoder_len / config.data.seq_len
  flops, shares = 0.0, _expert_shares(config)
  for leaf in parameters(config, vocab_size):
    on_encoder_positions = (
      leaf.path[0] == "encoder"
      or "cross_attention" in leaf.path
      and leaf.path[-1] in ("key", "value")
    )
    if leaf.multiplies and leaf.path[-1] not in lookups:
      share = shares[sublayer_at(m, leaf.path)] if leaf.kind == "experts" else 1
      flops += 2 * leaf.size * share * (encoder_ratio if on_encoder_positions else 1)
  return flops + _attention_flops(config)


def operations_per_step(config: Config, vocab_size: int) -> float:
  """Returns the multiply-adds per time step as Shazeer et al. 2017 count them (Tables 7 and 8).

  They are those of LSTMs, experts and gates, without embedding and softmax. Hierarchical gates
  count only in the groups that a token picks. This package computes them over all experts, and
  `flops_per_token` counts that.
  """
  router, shares, operations = router_of(config.model.moe), _expert_shares(config), 0.0
  picked_groups = 1.0
  if config.model.moe.router["name"] == "hierarchical":
    picked_groups = option(router, "primary_k") / option(router, "groups")
  for leaf in parameters(config, vocab_size):
    if leaf.multiplies and leaf.kind != "embedding":
      in_group = leaf.kind == "router" and "primary" not in leaf.path[-1]
      share = shares[sublayer_at(config.model, leaf.path)] if leaf.kind == "experts" else 1
      operations += leaf.size * (picked_groups if in_group else share)
  return operations


def _attention_flops(config: Config) -> float:
  """Returns the FLOPs per token of attention's scores and averages in all layers."""
  m, length = config.model, config.data.seq_len
  if m.family == "lstm":
    return 0.0
  # The features of a key and a value together.
  features = 2 * m.head_dim
  if m.attention == "latent":
    features = m.latent.nope_dim + m.latent.rope_dim + m.latent.value_dim
  visible = min(length, m.sliding_window or length)
  if entries := layout(m):
    models = own_models(m)
    heads = sum(models[entry].num_heads for entry in entries if kind(entry) == "attention")
    return 2.0 * heads * features * visible
  # The number of keys per token, summed over all layers.
  keys = sum(length if is_global else visible for is_global in global_layers(m))
  if m.family == "encoder_decoder":
    source = config.data.encoder_len
    # Cross-attention, and the encoder's work divided among the decoder's positions.
    keys += m.num_layers * source + encoder_layers(m) * source * source / length
  return 2.0 * m.num_heads * features * keys


def _expert_shares(config: Config) -> dict[str, float]:
  """Returns the share of all experts that one token activates, for each of `own_models`."""
  experts = config.model.moe.num_experts
  return {
    # A token may choose more experts than have an FFN if others have none.
    entry: min(experts_a_token(m, config.data.seq_len) / experts, 1.0) if experts else 0.0
    for entry, m in own_models(config.model).items()
  }


def parameters(config: Config, vocab_size: int) -> list[Parameter]:
  """Returns the parameters of a config's model.

  Args:
    config: A config with all sections.
    vocab_size: The size of the tokenizer's vocabulary, which counts if model.vocab_size is 0.
  """
  boxed = jax.tree_util.tree_leaves_with_path(
    abstract_variables(config, vocab_size)["params"],
    is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned),
  )
  return [
    Parameter(tuple(entry.key for entry in path), tuple(leaf.names), math.prod(leaf.value.shape))
    for path, leaf in boxed
  ]
