"""Experts on other devices, tokens in buffers of equal size: one all-to-all there, one back
(GShard, section 3.3)."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from moe_jax.dispatch.expert_function import ExpertFunction
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
  """The scatter dispatcher with its exchange written down: buffers [E, G*C, D] of a device's own
  groups are swapped.

  C slots a group and expert, filled in the order of the plan, so that who is served depends on no
  device's place. Each device sends, forward, 2 (1 - 1/expert) * G E C D rows' bytes for its G
  groups (there and back, in x's dtype), and as much backward; with a capacity factor that is f
  times its tokens, and empty slots travel, too. Dropless (`capacity` None) means C = S: E times its
  tokens; `ragged_all_to_all` sends K times. See `over_mesh` for the other axes. Without a mesh, or
  with expert=1, it is `scatter`.

  Args:
    plan: of G groups, [G, A] arrays; overflow included.
    x: tokens.
    experts: E of them, of which each device of the mesh axis "expert" holds E / expert.
    capacity: C; None = dropless.
    platform: not read.

  Returns:
    The gate-weighted sum of each token's experts, summed in float32, in x's dtype; 0 for tokens
      that have none.
  """

  def alone(plan, x, experts):
    return through_slots(plan, x, capacity, lambda rows: apply_buffers(experts, rows))

  def exchange(plan, x, experts, ways):
    return through_slots(plan, x, capacity, lambda rows: _there_and_back(experts, rows, ways))

  return over_mesh(alone, exchange, plan, x, experts)


def _there_and_back(
  experts: ExpertFunction, rows: Float[Array, "E G C D"], ways: int
) -> Float[Array, "E G C D"]:
  """The experts, spread over `ways` devices, on this device's buffers."""

  def swap(a):
    return jax.lax.all_to_all(a, "expert", split_axis=0, concat_axis=0, tiled=True)

  groups, *row = rows.shape[1:]
  arrived = (
    swap(rows).reshape(ways, -1, groups, *row).swapaxes(0, 1)
  )  # [E/ways, ways (of whom), G, C, D]
  done = apply_buffers(experts, arrived.reshape(-1, ways * groups, *row)).reshape(arrived.shape)
  return swap(done.swapaxes(0, 1).reshape(rows.shape))
