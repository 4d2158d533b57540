"""Capacity of experts and the allocation of their slots, for one group of tokens."""

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
  capacity_slots: Annotated[int, Bounds(0, INT32, "slots are counted in int32")] = option(
    0,
    "Slots of an expert whatever the group's size (Hugging Face's Switch has 64 a row); 0 means "
    "those of capacity_factor.",
    neutral=0,
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
    if self.capacity_slots:
      return self.capacity_slots
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
  """Returns the number of slots per expert and group, C, or None for dropless routing.

      basis "tokens":      C = round(factor * S / E)   Switch Eq. 3, ST-MoE, Expert Choice (its k),
                                                       flaxformer
      basis "assignments": C = round(factor * A / E)   GShard (factor 1 is its 2S/E), V-MoE

  With basis "assignments", the same factor gives A/S = K times as many slots as with "tokens".

  Args:
    tokens: The number of tokens per group, S. Padding is counted, because C is a static shape.
    experts: The number of experts, E.
    assignments: The number of assignments per group, A (K*S for token choice).
    factor: The capacity factor, > 0 and finite, or None for dropless. It is interpreted as an exact
      decimal number.
    basis: The quantity that the factor multiplies, "tokens" or "assignments".
    minimum: The least number of slots per expert, >= 1.
    rounding: "nearest" (flaxformer), "down" (Mesh-TensorFlow) or "up" (V-MoE, which then rounds up
      to a multiple of 4).

  Returns:
    C in [1, S], because no expert can use more than S slots, or None.

  Raises:
    ConfigError: If the basis or rounding is unknown, if the factor is not positive and finite, or
      if minimum < 1.
  """
  totals = {"tokens": tokens, "assignments": assignments}
  if basis not in totals:
    raise ConfigError("model.moe.capacity_basis", basis, f"must be one of {', '.join(totals)}")
  choose("model.moe.capacity_rounding", rounding, ROUNDINGS)
  if minimum < 1:
    raise ConfigError(
      "model.moe.min_capacity", minimum, "must be >= 1, because an expert needs at least 1 slot"
    )
  if factor is None:
    return None
  if not 0 < factor < math.inf:
    raise ConfigError(
      "model.moe.capacity_factor", factor, "must be > 0 and finite, or None for dropless"
    )
  return min(max(ROUNDINGS[rounding](exact(factor) * totals[basis] / experts), minimum), tokens)


def slot_index(plan: RoutingPlan) -> Int[Array, "A"]:
  """Returns the slot that each assignment would take (GShard Algorithm 1's c_e).

  It is the number of assignments of higher priority that name the same expert, in [0, A). It counts
  all of them, whether or not they fit. It is 0 for assignments to no expert.
  """
  rank, start, _ = ranks(plan.expert, plan.num_experts)
  return jnp.where(
    plan.expert < plan.num_experts, rank - start[jnp.minimum(plan.expert, plan.num_experts - 1)], 0
  )


def drop_overflow(plan: RoutingPlan, capacity: int | None) -> RoutingPlan:
  """Returns the plan without the assignments that find no slot.

  Dropped assignments get `expert` E and gate 0. A capacity of None drops nothing.
  """
  if capacity is None:
    return plan
  fits = slot_index(plan) < capacity
  return plan.replace(
    expert=jnp.where(fits, plan.expert, plan.num_experts), gate=jnp.where(fits, plan.gate, 0.0)
  )


def by_expert(
  expert: Int[Array, "A"], num_experts: int
) -> tuple[Int[Array, "A"], Int[Array, "E"], Int[Array, "E"]]:
  """Returns (order, start, count), which sort the assignments by expert and then by priority.

  The assignments to expert e are order[start[e] : start[e] + count[e]]. Assignments to no expert
  come last.
  """
  order = jnp.argsort(expert, stable=True).astype(jnp.int32)
  edges = jnp.searchsorted(expert[order], jnp.arange(num_experts + 1)).astype(jnp.int32)
  return order, edges[:-1], edges[1:] - edges[:-1]


def ranks(
  expert: Int[Array, "A"], num_experts: int
) -> tuple[Int[Array, "A"], Int[Array, "E"], Int[Array, "E"]]:
  """Returns (rank, start, count), where rank inverts the order that `by_expert` returns.

  The rank of an assignment is its place in that order. For start and count see `by_expert`.
  """
  order, start, count = by_expert(expert, num_experts)
  # The inverse of the permutation `order`.
  rank = (
    jnp.zeros_like(order)
    .at[order]
    .set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)
  )
  return rank, start, count


def slots(
  plan: RoutingPlan, capacity: int, tokens: int
) -> tuple[Int[Array, "E C"], Float[Array, "E C"]]:
  """Returns (token, gate) of each slot of each expert under `capacity`.

  An empty slot has gate 0 and the token index `tokens`, which is out of bounds: gathers in mode
  "fill" return 0 for it, scatters in mode "drop" ignore it, and its one-hot vector is all zeros. An
  assignment whose gate is 0 keeps its slot.

  Args:
    plan: The plan of one group.
    capacity: The number of slots per expert, C.
    tokens: The number of tokens of the group, S.
  """
  order, start, count = by_expert(plan.expert, plan.num_experts)
  slot = jnp.arange(capacity)
  assignment = order[jnp.minimum(start[:, None] + slot, order.size - 1)]
  is_filled = slot < count[:, None]
  return jnp.where(is_filled, plan.token[assignment], tokens), jnp.where(
    is_filled, plan.gate[assignment], 0.0
  )
