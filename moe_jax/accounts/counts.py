"""Parameters and FLOPs of a config, from the shapes of the real model."""

from __future__ import annotations

import dataclasses
import math

import jax
from flax import linen as nn

from moe_jax.assembly.experts import encoder_layers, experts_a_token, option, router_of
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
  """One parameter of a model: where it is, its logical axes ("layers" where it is stacked) and its
  number of values."""

  path: tuple[str, ...]
  axes: tuple[str | None, ...]
  size: int

  @property
  def kind(self) -> str:
    """One of `KINDS`: shared and extra FFNs are dense ones, attention's norms are norms, a head is
    an embedding.

    Widths are the matrices into and out of a Brainformer's sublayer of another width than the
    residual stream's.
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
    """Whether it is a matrix that tokens are multiplied with, be it that an embedding is tied to
    the output."""
    return self.kind not in ("norms", "relative bias") and not self.path[-1].endswith("_bias")


def parameter_counts(config: Config, vocab_size: int) -> tuple[int, int]:
  """(total, activated) parameters, by `jax.eval_shape` of the real model; activated: those that one
  token meets.

  Of E experts a token meets A/S: K for token choice, the capacity factor on average for expert
  choice, which may differ between a Brainformer's sublayers. The embedding counts in full in both,
  and so do an encoder and its decoder, which meet different tokens of an example.
  """
  total, activated, shares = 0, 0.0, _expert_shares(config)
  for leaf in parameters(config, vocab_size):
    total += leaf.size
    activated += leaf.size * (
      shares[sublayer_at(config.model, leaf.path)] if leaf.kind == "experts" else 1
    )
  return total, round(activated)


def parameters_by_kind(config: Config, vocab_size: int) -> dict[str, int]:
  """Parameters of each of `KINDS`; they add up to the total of `parameter_counts`."""
  counts: dict[str, int] = {name: 0 for name in KINDS}
  for leaf in parameters(config, vocab_size):
    counts[leaf.kind] += leaf.size
  return counts


def flops_per_token(config: Config, vocab_size: int) -> float:
  """FLOPs of the forward pass's matmuls a token: 2 a weight that the token meets, and attention.

  A token is one of the data.seq_len positions of a row. In an encoder-decoder these are the
  decoder's, and the work of the encoder on its data.encoder_len positions is divided among them;
  the decoder's keys and values of what the encoder made are computed there, too.

  Attention is counted as computed, over all positions that a query may see if it is the last of its
  row: scores and averages of values, 4 L H P a layer, 2 L H (nope + rope + value) for latent
  attention. Not counted: the embedding look-up, dispatch, norms, softmaxes. Training costs about
  three times this.
  """
  m = config.model
  lookups = {"embedding"} if not m.tied_embeddings or m.target_vocab_size else set()
  lookups |= {"target_embedding"} if not m.tied_embeddings else set()
  source = (
    config.data.encoder_len / config.data.seq_len
  )  # positions of the encoder for each of the decoder's
  flops, shares = 0.0, _expert_shares(config)
  for leaf in parameters(config, vocab_size):
    of_source = (
      leaf.path[0] == "encoder"
      or "cross_attention" in leaf.path
      and leaf.path[-1] in ("key", "value")
    )
    if leaf.multiplies and leaf.path[-1] not in lookups:
      met = shares[sublayer_at(m, leaf.path)] if leaf.kind == "experts" else 1
      flops += 2 * leaf.size * met * (source if of_source else 1)
  return flops + _attention_flops(config)


def operations_per_step(config: Config, vocab_size: int) -> float:
  """Multiply-adds a time step as Shazeer et al. 2017 count them (Tables 7 and 8): of LSTMs, experts
  and their gates.

  Not of embedding and softmax. Of hierarchical gates only those in the groups that a token picks;
  this package computes them over all experts, which `flops_per_token` counts.
  """
  router, shares, picked, operations = router_of(config.model.moe), _expert_shares(config), 1.0, 0.0
  if config.model.moe.router["name"] == "hierarchical":
    picked = option(router, "primary_k") / option(router, "groups")
  for leaf in parameters(config, vocab_size):
    if leaf.multiplies and leaf.kind != "embedding":
      inside = leaf.kind == "router" and "primary" not in leaf.path[-1]
      share = shares[sublayer_at(config.model, leaf.path)] if leaf.kind == "experts" else 1
      operations += leaf.size * (picked if inside else share)
  return operations


def _attention_flops(config: Config) -> float:
  m, length = config.model, config.data.seq_len
  if m.family == "lstm":
    return 0.0
  features = 2 * m.head_dim  # of a key and a value
  if m.attention == "latent":
    features = m.latent.nope_dim + m.latent.rope_dim + m.latent.value_dim
  seen = min(length, m.sliding_window or length)
  if entries := layout(m):
    models = own_models(m)
    heads = sum(models[entry].num_heads for entry in entries if kind(entry) == "attention")
    return 2.0 * heads * features * seen
  keys = m.num_layers * seen  # that a token's query meets in all layers
  if m.family == "encoder_decoder":
    source = config.data.encoder_len
    keys += m.num_layers * source + encoder_layers(m) * source * source / length
  return 2.0 * m.num_heads * features * keys


def _expert_shares(config: Config) -> dict[str, float]:
  """The share of all experts that one token meets, for each of `own_models`."""
  experts = config.model.moe.num_experts
  return {
    entry: experts_a_token(m, config.data.seq_len) / experts if experts else 0.0
    for entry, m in own_models(config.model).items()
  }


def parameters(config: Config, vocab_size: int) -> list[Parameter]:
  """The parameters of a config's model; `vocab_size` is the tokenizer's, used where
  model.vocab_size is 0."""
  boxed = jax.tree_util.tree_leaves_with_path(
    abstract_variables(config, vocab_size)["params"],
    is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned),
  )
  return [
    Parameter(tuple(entry.key for entry in path), tuple(leaf.names), math.prod(leaf.value.shape))
    for path, leaf in boxed
  ]
