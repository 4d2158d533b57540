"""Experts on other devices, all tokens to all of them: nobody sorts before sending (the "ring" of
JAX's MoE codes)."""

from __future__ import annotations

import functools

import jax
from jaxtyping import Array, Float

from moe_jax.dispatch.expert_function import ExpertFunction
from moe_jax.dispatch.expert_mesh import over_mesh, own_experts
from moe_jax.dispatch.grouped import alone, apply_grouped, drop_groups, known_platform
from moe_jax.routing.plan import RoutingPlan


def all_gather(
  plan: RoutingPlan,
  x: Float[Array, "G S D"],
  experts: ExpertFunction,
  capacity: int | None,
  platform: str,
) -> Float[Array, "G S D"]:
  """Each device gets the tokens and plans of all along the axis "expert", runs its own experts, and
  returns the sums.

  Receives, forward, (expert - 1) * T D of a device's T tokens in x's dtype, and as many float32
  sums on the way back (a reduce-scatter); backward the same the other way round. It depends on
  neither K nor the load: less than `ragged_all_to_all` where K comes near the number of devices,
  and the choice where assignments are very uneven. The rows are computed as `grouped` does, and
  dropless is free. See `over_mesh` for the other axes; without a mesh, or with expert=1, it is
  `grouped`.

  Args:
    plan: of G groups, [G, A] arrays; overflow included.
    x: tokens.
    experts: a pytree; E of them, of which each device of the mesh axis "expert" holds E / expert.
    capacity: C; None = dropless.
    platform: of the devices that will run it, e.g. "cpu", as `jax.Device.platform` says.

  Returns:
    The gate-weighted sum of each token's experts, summed in float32, in x's dtype; 0 for tokens
      that have none.

  Raises:
    ConfigError: unknown platform.
  """
  known_platform(platform)

  def exchange(plan, x, experts, ways):
    collect = functools.partial(jax.lax.all_gather, axis_name="expert", tiled=True)
    plan, x = jax.tree.map(collect, (drop_groups(plan, capacity), x))
    y = apply_grouped(own_experts(plan, experts.num_experts), x, experts, platform)
    return jax.lax.psum_scatter(y, "expert", tiled=True)

  return over_mesh(alone(capacity, platform), exchange, plan, x, experts)
