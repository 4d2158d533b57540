"""How a model routes validation text, recorded for the report of a run and for `analyse`."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from moe_jax import data, sharding
from moe_jax.data.options import DataOptions
from moe_jax.layers.moe import choices
from moe_jax.routing import RoutingPlan
from moe_jax.training import evaluate
from moe_jax.training.step import Batch, apply

# Stack of layers -> prefix of its arrays in a batch and of its metrics. A model without an encoder
# has the decoder only.
STACKS = {"encoder": "encoder_", "decoder": ""}


def make_route(model: nn.Module, mesh: Mesh) -> Callable[[Mapping[str, Any], Batch], Any]:
  """Returns a compiled `f(variables, batch)`, which returns what each stack does with its tokens.

  Every process can read the result, a dict from the name of each stack with experts to a dict with
    tokens, segment_ids: [B, L].
    experts: [E] zeros, which tell the number of experts.
    first: [Lm, B, L] The first choice of each token in each layer; E means no expert.
    second: [Lm, B, L] The second choice.
    entropy: [Lm, B, L] The entropy of the router's probabilities, in nats.
    top: [Lm, B, L] The largest of these probabilities.
  Layers of Soft MoE, whose router has no plan, lack the last three.
  """

  def route(variables, batch):
    _, aux = apply(model, variables, batch, train=False, return_routing=True)
    return {
      stack: _of_stack(batch, aux.metrics, prefix)
      for stack, prefix in STACKS.items()
      if f"{prefix}top1_expert" in aux.metrics
    }

  # Replicated outputs can be read on every process.
  return jax.jit(route, out_shardings=sharding.replicated(mesh))


def _of_stack(batch: Batch, metrics: Mapping[str, Any], prefix: str) -> dict[str, jax.Array]:
  """Returns the arrays of a stack; see `make_route`."""
  tokens = batch[f"{prefix}tokens" if prefix else "inputs"]
  routed = {
    "tokens": tokens,
    "segment_ids": batch[f"{prefix}segment_ids"],
    "experts": jnp.zeros(metrics["load"].shape[-1]),
    "first": metrics[f"{prefix}top1_expert"],
  }
  if f"{prefix}plan" not in metrics:
    return routed
  p = metrics[f"{prefix}probabilities"]
  return routed | {
    "second": _second(metrics[f"{prefix}plan"], len(tokens), tokens.shape[1]),
    # A probability of 0 contributes nothing.
    "entropy": -jnp.sum(jnp.where(p > 0, p * jnp.log(p), 0.0), axis=-1),
    "top": jnp.max(p, axis=-1),
  }


def _second(plan: RoutingPlan, rows: int, length: int) -> jax.Array:
  """Returns the second choice of each token, [Lm, B, L], of a plan with arrays [Lm, G, A].

  Args:
    plan: The plan of all layers.
    rows: The number of rows B.
    length: The number of tokens per row L.
  """
  layers, groups, _ = plan.expert.shape
  if plan.num_experts < 2:
    return jnp.full((layers, rows, length), plan.num_experts, jnp.int32)
  size = rows * length // groups
  chosen = jax.vmap(jax.vmap(lambda p: choices(p, size, 2)[1]))(plan)
  return chosen.reshape(layers, rows, length)


def expert_layers(model: nn.Module) -> dict[str, list[int]]:
  """Returns the indices of the layers with experts in each stack of a model."""
  stacks = {"encoder": "encoder_experts", "decoder": "decoder_experts"}
  if not hasattr(model, "encoder_experts"):
    stacks = {"decoder": "has_experts"}
  return {
    stack: [i for i, has_experts in enumerate(getattr(model, name, ())) if has_experts]
    for stack, name in stacks.items()
  }


def routed_batches(
  route: Callable,
  variables: Mapping[str, Any],
  options: DataOptions,
  tokenizer: data.Tokenizer,
  source: data.Source,
  batch_size: int,
  num_batches: int,
  mesh: Mesh,
) -> Iterator[dict[str, dict[str, np.ndarray]]]:
  """Yields what `route` returns for batches of validation text, as NumPy arrays.

  Args:
    route: The function that `make_route` returns.
    variables: The variables of the model, on the mesh.
    options: The options of the data.
    tokenizer: The tokenizer of the data.
    source: The source whose validation documents are read.
    batch_size: The number of rows of a batch, over all processes.
    num_batches: The largest number of batches, spread over the text; 0 means all.
    mesh: The mesh.
  """
  index, count = sharding.reader(mesh)
  for batch in data.validation_batches(
    options, tokenizer, source, batch_size, num_batches, process_index=index, process_count=count
  ):
    yield jax.tree.map(np.asarray, route(variables, evaluate.put(mesh, batch)))


def pieces(tokenizer: data.Tokenizer, ids: np.ndarray) -> list[str | None]:
  r"""Returns the text that each token stands for, or None for a special token.

  A character whose bytes are spread over several tokens stands at the last of them, and the others
  get "". Bytes that are not UTF-8 are written as in `\xe2`.
  """
  ids = np.asarray(ids)
  # Sentinels are beyond the tokenizer's ids. They are mapped to an additional entry, whose length
  # is 0.
  lengths = np.append(tokenizer.byte_lengths, 0)[np.minimum(ids, len(tokenizer.byte_lengths))]
  text = tokenizer.decode(ids)
  ends = np.cumsum(lengths)
  if len(text) == lengths.sum():
    parts = [text[end - length : end] for end, length in zip(ends, lengths, strict=True)]
  else:
    # This tokenizer strips the text that it decodes, so each token is decoded by itself.
    decoded = {i: tokenizer.decode([i]) for i in set(ids.tolist())}
    parts = [decoded[i] for i in ids.tolist()]
  shown: list[str | None] = []
  decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
  for part, length, following in zip(parts, lengths, [*lengths[1:], 0], strict=True):
    # A character ends at the latest before a special token.
    shown.append(decoder.decode(part, final=not following) if length else None)
  return shown
