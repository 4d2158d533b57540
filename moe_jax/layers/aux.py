"""The data types that layers receive beside their input and return beside their output."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, UInt32

from moe_jax.layers.cache import Cached
from moe_jax.routing import RoutingPlan, metrics


# JAX rebuilds pytrees with placeholder leaves that are not arrays, so the checks of shapes at run
# time are switched off for all classes of this file.
@typing.no_type_check
class Aux(struct.PyTreeNode):
  """The unweighted losses and the metrics of a layer, of a stack of layers or of a model.

  A layer without experts returns empty dictionaries. Layers return their Aux instead of sowing it,
  so that nothing can be dropped silently and `nn.scan` stacks it by layer.

  Attributes:
    losses: Name -> scalar for one layer, [Lm] for a stack of layers, and a scalar again for a
      model. The losses of a `Microbatch` are its parts of the batch's losses, which are the sums of
      the parts.
    metrics: Name -> array, or the `RoutingPlan` under the name "plan". A stack of layers adds a
      leading axis Lm over the layers with experts, in order.
    sums: The sums from which the metrics are computed, and which microbatches add up; see
      `routing.metrics.sums`.
    shares: Name -> f of each loss that multiplies f and P of the whole batch
      (`LossOptions.balance_over`). The shares of a `Microbatch` are its parts of the batch's.
    logits: Logits of one layer, for `LayerContext.before` of the next one (`gate_residual`). None
      in all others, and in a stack of layers.
  """

  losses: dict[str, Float[Array, "*Lm"]] = struct.field(default_factory=dict)
  metrics: dict[str, Any] = struct.field(default_factory=dict)
  sums: dict[str, Array] = struct.field(default_factory=dict)
  shares: dict[str, Float[Array, "*Lm E"]] = struct.field(default_factory=dict)
  logits: Float[Array, "B L N"] | None = None


def measured(sums: dict[str, Array], **rest: Any) -> Aux:
  """Returns the Aux of a layer whose metrics follow from `sums`.

  Args:
    sums: The result of `routing.metrics.sums`. No gradient flows through it.
    rest: The other fields of the Aux.
  """
  sums = jax.tree.map(jax.lax.stop_gradient, sums)
  return Aux(metrics=metrics.finish(sums), sums=sums, **rest)


def stack(auxes: Sequence[Aux]) -> Aux:
  """Returns the Aux of several layers as one Aux with a leading axis.

  Layers without experts contribute nothing. If layers route differently, shorter plans are padded
  with assignments to no expert.
  """
  with_experts = _pad_plans([aux for aux in auxes if aux.metrics])
  if not with_experts:
    return Aux()
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *with_experts)


def _pad_plans(auxes: Sequence[Aux]) -> list[Aux]:
  """Pads all plans to the longest, so that they can be stacked."""
  longest = max(
    (aux.metrics["plan"].expert.shape[-1] for aux in auxes if "plan" in aux.metrics), default=0
  )

  def padded(aux: Aux) -> Aux:
    return aux.replace(metrics=aux.metrics | {"plan": _pad_plan(aux.metrics["plan"], longest)})

  return [padded(aux) if longest else aux for aux in auxes]


def _pad_plan(plan: RoutingPlan, length: int) -> RoutingPlan:
  """Pads the plan to `length` assignments per group; the added ones name no expert."""
  padding = [(0, 0)] * (plan.expert.ndim - 1) + [(0, length - plan.expert.shape[-1])]
  return dataclasses.replace(
    plan,
    token=jnp.pad(plan.token, padding),
    gate=jnp.pad(plan.gate, padding),
    expert=jnp.pad(plan.expert, padding, constant_values=plan.num_experts),
  )


def concatenate(stacks: Sequence[Aux]) -> Aux:
  """Concatenates stacks of layers along their leading axis; plans are padded as in `stack`."""
  with_experts = _pad_plans([aux for aux in stacks if aux.metrics])
  if not with_experts:
    return Aux()
  return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *with_experts)


@typing.no_type_check
class Microbatch(struct.PyTreeNode):
  """The place of a microbatch in its batch, and what the model must know about the whole batch.

  Microbatch m of `count` has the rows m, m + count, ... of the batch. The random numbers of each
  token's routing are those that it would get in the undivided batch, as long as routing groups lie
  within rows.

  Attributes:
    index: The number m of the microbatch, from 0.
    tokens: The number of real tokens of the whole batch. With an encoder, only those of the decoder
      count.
    encoder_tokens: The number of real tokens of the encoder in the whole batch; None without an
      encoder.
    shares: `Aux.shares` of the whole batch, with a leading axis over the layers with experts. A
      loss that is not named takes f of the microbatch.
    count: The number of microbatches.
  """

  index: Int[Array, ""]
  tokens: Float[Array, ""]
  encoder_tokens: Float[Array, ""] | None = None
  shares: dict[str, Float[Array, "Lm E"]] = struct.field(default_factory=dict)
  count: int = struct.field(pytree_node=False, default=1)


@typing.no_type_check
class LayerContext(struct.PyTreeNode):
  """What every layer of a model receives beside the activations of B sequences of L tokens.

  Attributes:
    token_ids: Vocabulary ids; None if no router of the model reads them.
    segment_ids: Document of each token within its row, from 1; 0 is padding.
    positions: Place of each token in its document, from 0.
    train: Whether dropout, jitter and noise are on.
    return_routing: Whether each layer also reports its plan, the first choice of each token and
      the probabilities of the experts. This costs memory and is meant for evaluation.
    memory: The encoder's output of M tokens, which cross-attention reads; None in a model without
      an encoder.
    memory_segments: Segment of each token of the memory. A token sees those of its own segment.
    micro: The microbatch that the rows belong to. Its `tokens` must count the kind of tokens that
      the rows hold, the encoder's or the decoder's. None means that the rows are the whole batch.
    bias_table: The relative biases that all attention layers of the stack share, one number for
      each of H heads and N buckets (`relative_bias.py`). None means that each layer has its own
      table, or that there is none.
    cached: Where the tokens are in rows of which the layers have read the beginning and kept what
      the rest needs of it (`cache.py`). None means that the rows are whole.
    before: Logits over N experts of the last layer with experts, for layers with `gate_residual`.
      None means that there was none, or that no layer reads it.
    dropless: Whether each token is routed by itself and no assignment is dropped, whatever the
      capacity of the experts and the size of routing groups. Decoding needs it, because a token
      must get the same experts whether or not its successors are there.
  """

  token_ids: Int[Array, "B L"] | None
  segment_ids: Int[Array, "B L"]
  positions: Int[Array, "B L"]
  train: bool = struct.field(pytree_node=False, default=False)
  return_routing: bool = struct.field(pytree_node=False, default=False)
  memory: Float[Array, "B M D"] | None = None
  memory_segments: Int[Array, "B M"] | None = None
  micro: Microbatch | None = None
  bias_table: Float[Array, "H N"] | None = None
  cached: Cached | None = None
  before: Float[Array, "B L N"] | None = None
  dropless: bool = struct.field(pytree_node=False, default=False)

  @classmethod
  def of_rows(
    cls, batch: int, length: int, train: bool = False, token_ids: Int[Array, "B L"] | None = None
  ) -> LayerContext:
    """Returns the context of rows that hold one document each, without padding."""
    shape = (batch, length)
    return cls(
      token_ids=token_ids,
      segment_ids=jnp.ones(shape, jnp.int32),
      positions=jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), shape),
      train=train,
    )


@typing.no_type_check
class LayerRouting(struct.PyTreeNode):
  """What the router of a layer receives from outside the layer.

  For Lm layers with experts together, every array has a leading axis Lm.

  Attributes:
    bias: The bias of loss-free balancing; see `RoutingContext`.
    stored: A plan of [G, A] arrays to follow instead of the router's (`routing/replay.py`).
    shares: `Microbatch.shares`.
    salt: Makes a router without weights differ from layer to layer and from seed to seed; see
      `RoutingContext`.
  """

  bias: Float[Array, "*Lm E"] | None = None
  stored: RoutingPlan | None = None
  shares: dict[str, Float[Array, "*Lm E"]] = struct.field(default_factory=dict)
  salt: UInt32[Array, "*Lm"] | None = None
