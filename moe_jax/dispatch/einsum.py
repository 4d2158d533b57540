"""The obvious dispatcher: two one-hot matmuls (GShard Algorithm 2; Mesh-TensorFlow, Switch)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.dispatch.capacity import slots
from moe_jax.dispatch.expert_function import ExpertFunction
from moe_jax.dispatch.expert_mesh import to_experts, to_tokens
from moe_jax.routing.plan import RoutingPlan


def einsum(
  plan: RoutingPlan,
  x: Float[Array, "G S D"],
  experts: ExpertFunction,
  capacity: int | None,
  platform: str,
) -> Float[Array, "G S D"]:
  """GShard Algorithm 2: GSEC,GSM->EGCM, the experts, GSEC,GECM->GSM (its M is D here).

  Costs 4*G*S*E*C*D FLOPs and a [G, E, C, S] mask on top of the experts: with E*C = f*S that is
  quadratic in S, so groups must be small. Dropless (`capacity` None) means C = S, and the experts
  compute E*S rows a group. On a mesh the buffers go to their experts and back by all-to-alls of
  GSPMD's; `all_to_all` writes them down.

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
  groups, tokens, width = x.shape
  capacity = tokens if capacity is None else capacity
  token, gate = jax.vmap(lambda p: slots(p, capacity, tokens))(plan)  # [G, E, C]
  mask = jax.nn.one_hot(token, tokens, dtype=x.dtype)  # [G, E, C, S]; all zeros for an empty slot
  inputs = to_experts(jnp.einsum("gecs,gsd->egcd", mask, x))
  outputs = to_tokens(
    experts.buffers(inputs.reshape(-1, groups * capacity, width)).reshape(inputs.shape)
  )
  combine = gate[..., None] * mask.astype(jnp.float32)
  return jnp.einsum("gecs,egcd->gsd", combine, outputs.astype(jnp.float32)).astype(x.dtype)
