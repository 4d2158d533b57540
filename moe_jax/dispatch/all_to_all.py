"""Dispatch by all-to-all exchanges of buffers of equal size (GShard, section 3.3)."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from moe_jax.dispatch.expert_function import RECEIVED, ExpertFunction, named
from moe_jax.dispatch.expert_mesh import over_mesh
from moe_jax.dispatch.scatter import apply_buffers, through_slots
from moe_jax.routing.plan import RoutingPlan


def all_to_all(
  plan: RoutingPlan,
  x: Float[Array, "G S D"],
  experts: ExpertFunction,
  capacity: int | None,
  platform: str,
) -> Float[Array, "G S D"]:
  """Exchanges buffers of token rows between devices with two explicit all-to-alls.

  This is the scatter dispatcher with its communication written down. Each device swaps the buffers
  [E, G*C, D] of its own groups. There are C slots per group and expert, which are filled in the
  order of the plan, so that the tokens that are served do not depend on the mesh.

  In the forward pass, each device sends 2 (1 - 1/expert) * G E C D numbers in the dtype of x for
  its G groups (there and back), where "expert" is the size of the axis, and as many in the backward
  pass. With a capacity factor that is f times its tokens; empty slots travel, too. Dropless routing
  (`capacity` None) uses C = S and sends E times the tokens, whereas `ragged_all_to_all` sends K
  times the tokens. See `over_mesh` for the other mesh axes. Without a mesh, or with expert=1, this
  is `scatter`.

  Args:
    plan: The assignments of G groups, as [G, A] arrays, including those that may overflow.
    x: The tokens.
    experts: The E experts. Each device of the mesh axis "expert" holds E / expert of them.
    capacity: The number of slots per expert and group, C. None means dropless.
    platform: Not read.

  Returns:
    The gate-weighted sum of the outputs of each token's experts, which is 0 for tokens without
    experts. It is accumulated in float32 and has the dtype of x.
  """

  def alone(plan, x, experts):
    return through_slots(plan, x, capacity, lambda rows: apply_buffers(experts, rows))

  def exchange(plan, x, experts, ways):
    return through_slots(plan, x, capacity, lambda rows: _there_and_back(experts, rows, ways))

  return over_mesh(alone, exchange, plan, x, experts)


def _there_and_back(
  experts: ExpertFunction, rows: Float[Array, "E G C D"], ways: int
) -> Float[Array, "E G C D"]:
  """Applies experts that are spread over `ways` devices to the buffers of this device."""

  def swap(a):
    return jax.lax.all_to_all(a, "expert", split_axis=0, concat_axis=0, tiled=True)

  groups, *row = rows.shape[1:]
  # Each device sends the buffers of E/ways experts to each other device. What it receives has shape
  # [E/ways, ways, G, C, D], where the second axis is the device that sent the rows.
  arrived = named(swap(rows), RECEIVED).reshape(ways, -1, groups, *row).swapaxes(0, 1)
  done = apply_buffers(experts, arrived.reshape(-1, ways * groups, *row)).reshape(arrived.shape)
  return swap(done.swapaxes(0, 1).reshape(rows.shape))
