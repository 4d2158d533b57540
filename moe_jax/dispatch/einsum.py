"""Dispatch by two one-hot matmuls (GShard Algorithm 2; Mesh-TensorFlow, Switch)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.dispatch.capacity import slots
from moe_jax.dispatch.expert_function import RECEIVED, RETURNED, ExpertFunction, named
from moe_jax.dispatch.expert_mesh import to_experts, to_tokens
from moe_jax.routing.plan import RoutingPlan


def einsum(
  plan: RoutingPlan,
  x: Float[Array, "G S D"],
  experts: ExpertFunction,
  capacity: int | None,
  platform: str,
) -> Float[Array, "G S D"]:
  """Dispatches and combines tokens by matmuls with one-hot masks (GShard Algorithm 2).

  The algorithm is GSEC,GSM->EGCM, then the experts, then GSEC,GECM->GSM. Its M is D here.

  It costs 4*G*S*E*C*D FLOPs and a [G, E, C, S] mask in addition to the experts. With E*C = f*S that
  is quadratic in S, so groups should be small. Dropless routing (`capacity` None) uses C = S, and
  the experts compute E*S rows per group. On a mesh, GSPMD inserts the all-to-alls that bring the
  buffers to their experts and back; in `all_to_all` they are explicit.

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
  groups, tokens, width = x.shape
  capacity = tokens if capacity is None else capacity
  token, gate = jax.vmap(lambda p: slots(p, capacity, tokens))(plan)  # [G, E, C]
  mask = jax.nn.one_hot(token, tokens, dtype=x.dtype)  # [G, E, C, S]; all zeros for an empty slot
  inputs = named(to_experts(jnp.einsum("gecs,gsd->egcd", mask, x)), RECEIVED)
  outputs = to_tokens(
    experts.buffers(inputs.reshape(-1, groups * capacity, width)).reshape(inputs.shape)
  )
  outputs = named(outputs, RETURNED)
  combine = gate[..., None] * mask.astype(jnp.float32)
  return jnp.einsum("gecs,egcd->gsd", combine, outputs.astype(jnp.float32)).astype(x.dtype)
