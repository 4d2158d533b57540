"""What a layer returns beside its output, and what it is told beside its input."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, UInt32

from moe_jax.routing import RoutingPlan, metrics


# JAX rebuilds pytrees with placeholder leaves, which no shape check survives.
@typing.no_type_check
@struct.dataclass
class Aux:
  """Losses (unweighted) and metrics of a layer; a layer without experts returns empty ones.

  Returned, never sown: nothing is silently dropped, and `nn.scan` stacks it by layer.

  Attributes:
    losses: name -> scalar of a layer, [Lm] of a stack of layers, scalar again of a model. Of a
      `Microbatch`: its part of the batch's loss, which is the sum of the parts.
    metrics: name -> array; a stack of layers adds a leading axis Lm, the layers with experts in
      order.
    sums: what the metrics are made from and microbatches add up, see `routing.metrics.sums`.
    shares: name -> f of each loss that multiplies f and P of the whole batch
      (`LossOptions.balance_over`). Of a `Microbatch`: its part, likewise.
  """

  losses: dict[str, Float[Array, "*Lm"]] = struct.field(default_factory=dict)
  metrics: dict[str, Array] = struct.field(default_factory=dict)
  sums: dict[str, Array] = struct.field(default_factory=dict)
  shares: dict[str, Float[Array, "*Lm E"]] = struct.field(default_factory=dict)


def measured(sums: dict[str, Array], **rest: Any) -> Aux:
  """The Aux of a layer with these `routing.metrics.sums`."""
  sums = jax.tree.map(jax.lax.stop_gradient, sums)
  return Aux(metrics=metrics.finish(sums), sums=sums, **rest)


def stack(auxes: Sequence[Aux]) -> Aux:
  """The layers' Aux as one with a leading axis; those without experts contribute nothing.

  Where layers route differently, shorter plans are filled up with assignments that name nobody.
  """
  full = _even([aux for aux in auxes if aux.metrics])
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *full) if full else Aux()


def _even(auxes: Sequence[Aux]) -> list[Aux]:
  """The same, with plans of one length."""
  longest = max(
    (aux.metrics["plan"].expert.shape[-1] for aux in auxes if "plan" in aux.metrics), default=0
  )

  def fill(aux):
    return aux.replace(metrics=aux.metrics | {"plan": _fill(aux.metrics["plan"], longest)})

  return [fill(aux) if longest else aux for aux in auxes]


def _fill(plan: RoutingPlan, length: int) -> RoutingPlan:
  """The plan with `length` assignments a group."""
  more = [(0, 0)] * (plan.expert.ndim - 1) + [(0, length - plan.expert.shape[-1])]
  return plan.replace(
    token=jnp.pad(plan.token, more),
    gate=jnp.pad(plan.gate, more),
    expert=jnp.pad(plan.expert, more, constant_values=plan.num_experts),
  )


def concatenate(stacks: Sequence[Aux]) -> Aux:
  """Stacks of layers, one behind the other; their plans are filled up as in `stack`."""
  full = _even([aux for aux in stacks if aux.metrics])
  return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *full) if full else Aux()


@typing.no_type_check
@struct.dataclass
class Microbatch:
  """Which part of a batch a model sees where a training step cuts it, and what it must know of the
  whole.

  Microbatch m of `count` has rows m, m + count, ... of the batch. What each token's routing draws
  at random is what it would draw in the uncut batch, as long as routing groups lie within rows.

  Attributes:
    index: m, from 0.
    tokens: how many tokens of the whole batch are real; of the decoder's, where there is an
      encoder.
    encoder_tokens: how many of the encoder's are; None without an encoder.
    shares: `Aux.shares` of the whole batch, by layer with experts. A loss that is not named takes f
      of the microbatch.
    count: how many there are.
  """

  index: Int[Array, ""]
  tokens: Float[Array, ""]
  encoder_tokens: Float[Array, ""] | None = None
  shares: dict[str, Float[Array, "Lm E"]] = struct.field(default_factory=dict)
  count: int = struct.field(pytree_node=False, default=1)


@typing.no_type_check
@struct.dataclass
class LayerContext:
  """What every layer of a model sees beside the activations. B sequences of L tokens.

  Attributes:
    token_ids: vocabulary ids.
    segment_ids: which document of its row a token belongs to, from 1; 0 is padding.
    positions: place in the document, from 0.
    train: dropout, jitter and noise are on.
    return_routing: also report each layer's plan and each token's first-choice expert (costs
      memory: for evaluation).
    memory: the encoder's output, M tokens, which cross-attention reads; None in a model without an
      encoder.
    memory_segments: which segment each of these belongs to; a token sees those of its own.
    micro: the rows are those of this microbatch, whose `tokens` are of these rows; None: they are
      the whole batch.
    bias_table: the relative biases that all attention layers of the stack share, a number for each
      of H heads and N buckets (`relative_bias.py`); None where each layer has its own, or has none.
  """

  token_ids: Int[Array, "B L"]
  segment_ids: Int[Array, "B L"]
  positions: Int[Array, "B L"]
  train: bool = struct.field(pytree_node=False, default=False)
  return_routing: bool = struct.field(pytree_node=False, default=False)
  memory: Float[Array, "B M D"] | None = None
  memory_segments: Int[Array, "B M"] | None = None
  micro: Microbatch | None = None
  bias_table: Float[Array, "H N"] | None = None


@typing.no_type_check
@struct.dataclass
class LayerRouting:
  """What a layer's router gets from outside: of a layer, or of Lm layers with experts (then with a
  leading axis).

  Attributes:
    bias: of loss-free balancing, see `RoutingContext`.
    stored: a plan of [G, A] arrays to follow instead of the router's (`routing/replay.py`).
    shares: of a `Microbatch`.
    salt: what makes a router without weights differ from layer to layer and from seed to seed, see
      `RoutingContext`.
  """

  bias: Float[Array, "*Lm E"] | None = None
  stored: RoutingPlan | None = None
  shares: dict[str, Float[Array, "*Lm E"]] = struct.field(default_factory=dict)
  salt: UInt32[Array, "*Lm"] | None = None
