"""Dispatch by index: rows are copied to the experts' buffers and scattered back; no one-hot
matmuls."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.dispatch.capacity import slots
from moe_jax.dispatch.expert_function import ExpertFunction
from moe_jax.dispatch.expert_mesh import to_experts, to_tokens
from moe_jax.routing.plan import RoutingPlan


def scatter(
  plan: RoutingPlan,
  x: Float[Array, "G S D"],
  experts: ExpertFunction,
  capacity: int | None,
  platform: str,
) -> Float[Array, "G S D"]:
  """Gathers each slot's token, applies the experts to [E, G*C, D], scatter-adds the weighted
  results to the tokens.

  One gather and one scatter-add of E*C rows a group: each is the other's gradient. The experts
  compute E*C rows a group: f*S with a capacity factor, but E*S if dropless (`capacity` None means C
  = S), E/K times what is needed; use the grouped dispatcher there. On a mesh the buffers go to
  their experts and back by all-to-alls of GSPMD's: two forward and two backward. On TPUs GSPMD adds
  two of the same size around the scatter-add of the tokens' gradient, six in all; `all_to_all`
  writes its four down.

  Args:
    plan: of G groups, [G, A] arrays; overflow included.
    x: tokens.
    experts: applied once, to all groups' buffers together.
    capacity: C; None = dropless.
    platform: not read.

  Returns:
    The gate-weighted sum of each token's experts, summed in float32, in x's dtype; 0 for tokens
      that have none.
  """

  def apply(rows):
    return to_tokens(apply_buffers(experts, to_experts(rows)))

  return through_slots(plan, x, capacity, apply).astype(x.dtype)


def through_slots(
  plan: RoutingPlan,
  x: Float[Array, "G S D"],
  capacity: int | None,
  apply: Callable[[Float[Array, "E G C D"]], Float[Array, "E G C D"]],
) -> Float[Array, "G S D"]:
  """Copies tokens to their slots, lets `apply` make of them what it will, adds that up by token; in
  float32."""
  tokens, width = x.shape[1:]
  capacity = tokens if capacity is None else capacity
  token, gate = jax.vmap(lambda p: slots(p, capacity, tokens))(plan)  # [G, E, C]
  # The cast makes the gradient of x add up in float32, as the einsum dispatcher's matmul does.
  pick = jax.vmap(lambda rows, token: rows.at[token].get(mode="fill", fill_value=0))
  inputs = pick(x.astype(jnp.float32), token).astype(x.dtype).swapaxes(0, 1)  # [E, G, C, D]
  weighted = gate[..., None] * apply(inputs).swapaxes(0, 1).astype(jnp.float32)  # [G, E, C, D]
  add_up = jax.vmap(
    lambda token, rows: jnp.zeros((tokens, width), rows.dtype).at[token].add(rows, mode="drop")
  )
  return add_up(token, weighted)


def apply_buffers(
  experts: ExpertFunction, rows: Float[Array, "E G C D"]
) -> Float[Array, "E G C D"]:
  """The experts on all groups' buffers together."""
  return experts.buffers(rows.reshape(rows.shape[0], -1, rows.shape[-1])).reshape(rows.shape)
