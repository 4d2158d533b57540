"""Which assignments find a slot. One group; `vmap` over groups."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.errors import ConfigError, choose
from moe_jax.options import CAPACITY, INT32, Bounds, OneOf, Options, option
from moe_jax.routing.options import exact
from moe_jax.routing.plan import RoutingPlan

ROUNDINGS = {"nearest": round, "down": math.floor, "up": math.ceil}


@dataclasses.dataclass(frozen=True)
class CapacityOptions(Options):
  """The part of the section `model.moe` that says how many slots an expert has; see `slots`."""

  capacity_factor: Annotated[float, CAPACITY] | None = option(
    None, "Slots an expert has, as a multiple of capacity_basis; None drops nobody.", neutral=None
  )
  eval_capacity_factor: Annotated[float, CAPACITY] | None = option(
    None, "The factor at evaluation; None means the same as in training.", neutral=None
  )
  capacity_basis: Literal["tokens", "assignments"] = option(
    "tokens",
    "What the factor multiplies: S / E (tokens) or S * K / E (assignments), for S tokens of K "
    "assignments to E experts.",
    neutral="tokens",
  )
  capacity_rounding: Annotated[str, OneOf(ROUNDINGS)] = option(
    "nearest",
    "How slots are rounded: nearest (flaxformer), down (Mesh-TensorFlow) or up (V-MoE).",
    neutral="nearest",
  )
  min_capacity: Annotated[int, Bounds(1, INT32, "slots are counted in int32")] = option(
    1, "The least number of slots of an expert.", neutral=1
  )

  def factor(self, train: bool) -> float | None:
    """Returns the capacity factor in training or at evaluation."""
    if train or self.eval_capacity_factor is None:
      return self.capacity_factor
    return self.eval_capacity_factor

  def slots(self, tokens: int, experts: int, assignments: int, train: bool) -> int | None:
    """Returns the slots of an expert, C; see `expert_capacity`."""
    return expert_capacity(
      tokens,
      experts,
      assignments,
      self.factor(train),
      self.capacity_basis,
      self.min_capacity,
      self.capacity_rounding,
    )


def expert_capacity(
  tokens: int,
  experts: int,
  assignments: int,
  factor: float | None,
  basis: str,
  minimum: int,
  rounding: str = "nearest",
) -> int | None:
  """Slots an expert, C; None means that nobody is ever dropped.

      basis "tokens":      C = round(factor * S / E)   Switch Eq. 3, ST-MoE, Expert Choice (its k),
                                                       flaxformer
      basis "assignments": C = round(factor * A / E)   GShard (factor 1 is its 2S/E), V-MoE

  The same factor means A/S = K times as many slots under the second.

  Args:
    tokens: S, tokens a group. Padding is counted, because C is a shape.
    experts: E.
    assignments: A, assignments a group (K*S for token choice).
    factor: > 0 and finite, or None for dropless; taken as the decimal number that it is written as.
    basis: what the factor multiplies.
    minimum: least slots an expert, >= 1.
    rounding: "nearest" (flaxformer), "down" (Mesh-TensorFlow) or "up" (V-MoE, which goes on to a
      multiple of 4).

  Returns:
    C in [1, S] (no expert can use more than S slots), or None.

  Raises:
    ConfigError: unknown basis or rounding, factor <= 0, minimum < 1.
  """
  slots = {"tokens": tokens, "assignments": assignments}
  if basis not in slots:
    raise ConfigError("model.moe.capacity_basis", basis, f"must be one of {', '.join(slots)}")
  choose("model.moe.capacity_rounding", rounding, ROUNDINGS)
  if minimum < 1:
    raise ConfigError("model.moe.min_capacity", minimum, "an expert needs at least 1 slot")
  if factor is None:
    return None
  if not 0 < factor < math.inf:
    raise ConfigError(
      "model.moe.capacity_factor", factor, "must be > 0 and finite, or None for dropless"
    )
  return min(max(ROUNDINGS[rounding](exact(factor) * slots[basis] / experts), minimum), tokens)


def slot_index(plan: RoutingPlan) -> Int[Array, "A"]:
  """How many assignments of higher priority name the same expert: the slot each would take (GShard
  Algorithm 1's c_e).

  The counter runs on whether or not an assignment fits. In [0, A); 0 where the assignment names
  nobody.
  """
  rank, start, _ = ranks(plan.expert, plan.num_experts)
  return jnp.where(
    plan.expert < plan.num_experts, rank - start[jnp.minimum(plan.expert, plan.num_experts - 1)], 0
  )


def drop_overflow(plan: RoutingPlan, capacity: int | None) -> RoutingPlan:
  """The plan without the assignments that find no slot: they name nobody and their gate is 0. None
  drops nobody."""
  if capacity is None:
    return plan
  fits = slot_index(plan) < capacity
  return plan.replace(
    expert=jnp.where(fits, plan.expert, plan.num_experts), gate=jnp.where(fits, plan.gate, 0.0)
  )


def by_expert(
  expert: Int[Array, "A"], num_experts: int
) -> tuple[Int[Array, "A"], Int[Array, "E"], Int[Array, "E"]]:
  """The assignments sorted by expert and then by priority: (order, start, count).

  Expert e's assignments are order[start[e] : start[e] + count[e]]; those that name nobody are last.
  """
  order = jnp.argsort(expert, stable=True).astype(jnp.int32)
  edges = jnp.searchsorted(expert[order], jnp.arange(num_experts + 1)).astype(jnp.int32)
  return order, edges[:-1], edges[1:] - edges[:-1]


def ranks(
  expert: Int[Array, "A"], num_experts: int
) -> tuple[Int[Array, "A"], Int[Array, "E"], Int[Array, "E"]]:
  """Each assignment's place in the order of `by_expert`, and each expert's start and count
  there."""
  order, start, count = by_expert(expert, num_experts)
  rank = (
    jnp.zeros_like(order)
    .at[order]
    .set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)
  )
  return rank, start, count


def slots(
  plan: RoutingPlan, capacity: int, tokens: int
) -> tuple[Int[Array, "E C"], Float[Array, "E C"]]:
  """Which token sits in which slot, and with what gate: what is left of a plan of `tokens` tokens
  under `capacity`.

  An empty slot holds token `tokens`, which is out of bounds (gathers fill it, scatters drop it,
  one-hot makes it zeros), with gate 0. An assignment whose gate is 0 keeps its slot.
  """
  order, start, count = by_expert(plan.expert, plan.num_experts)
  slot = jnp.arange(capacity)
  assignment = order[jnp.minimum(start[:, None] + slot, order.size - 1)]
  filled = slot < count[:, None]
  return jnp.where(filled, plan.token[assignment], tokens), jnp.where(
    filled, plan.gate[assignment], 0.0
  )
