"""Dispatch by index, which gathers rows into the experts' buffers and scatters them back."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.dispatch.capacity import slots
from moe_jax.dispatch.expert_function import RECEIVED, RETURNED, ExpertFunction, named
from moe_jax.dispatch.expert_mesh import to_experts, to_tokens
from moe_jax.routing.plan import RoutingPlan


def scatter(
  plan: RoutingPlan,
  x: Float[Array, "G S D"],
  experts: ExpertFunction,
  capacity: int | None,
  platform: str,
) -> Float[Array, "G S D"]:
  """Gathers tokens into buffers [E, G*C, D], applies the experts and scatter-adds the results.

  It needs one gather and one scatter-add of E*C rows per group, each of which is the gradient of
  the other. The experts compute E*C rows per group. That is f*S with a capacity factor. Dropless
  routing (`capacity` None) uses C = S and computes E*S rows, which is E/K times the number needed;
  use the grouped dispatcher there.

  On a mesh, GSPMD inserts the all-to-alls that bring the buffers to their experts and back: two in
  the forward pass and two in the backward pass. On TPUs, GSPMD adds two more of the same size
  around the scatter-add of the tokens' gradient, which makes six. `all_to_all` has four explicit
  ones.

  Args:
    plan: The assignments of G groups, as [G, A] arrays, including those that may overflow.
    x: The tokens.
    experts: The experts, which are applied once to the buffers of all groups together.
    capacity: The number of slots per expert and group, C. None means dropless.
    platform: Not read.

  Returns:
    The gate-weighted sum of the outputs of each token's experts, which is 0 for tokens without
    experts. It is accumulated in float32 and has the dtype of x.
  """

  def apply(rows):
    return to_tokens(apply_buffers(experts, named(to_experts(rows), RECEIVED)))

  return through_slots(plan, x, capacity, apply).astype(x.dtype)


def through_slots(
  plan: RoutingPlan,
  x: Float[Array, "G S D"],
  capacity: int | None,
  apply: Callable[[Float[Array, "E G C D"]], Float[Array, "E G C D"]],
) -> Float[Array, "G S D"]:
  """Copies tokens to their slots, calls `apply` on the buffers and sums the results per token.

  Args:
    plan: The assignments of G groups, including those that may overflow.
    x: The tokens.
    capacity: The number of slots per expert and group, C. None means C = S.
    apply: A function from the buffers to the outputs of the experts.

  Returns:
    The gate-weighted sum of the results of each token in float32.
  """
  tokens, width = x.shape[1:]
  capacity = tokens if capacity is None else capacity
  token, gate = jax.vmap(lambda p: slots(p, capacity, tokens))(plan)  # [G, E, C]
  # The cast makes the gradient of x accumulate in float32, as in the matmul of `einsum`.
  pick = jax.vmap(lambda rows, token: rows.at[token].get(mode="fill", fill_value=0))
  inputs = pick(x.astype(jnp.float32), token).astype(x.dtype).swapaxes(0, 1)  # [E, G, C, D]
  returned = named(apply(inputs), RETURNED)
  weighted = gate[..., None] * returned.swapaxes(0, 1).astype(jnp.float32)  # [G, E, C, D]
  add_up = jax.vmap(
    lambda token, rows: jnp.zeros((tokens, width), rows.dtype).at[token].add(rows, mode="drop")
  )
  return add_up(token, weighted)


def apply_buffers(
  experts: ExpertFunction, rows: Float[Array, "E G C D"]
) -> Float[Array, "E G C D"]:
  """Applies the experts to the buffers of all groups together."""
  return experts.buffers(rows.reshape(rows.shape[0], -1, rows.shape[-1])).reshape(rows.shape)
