"""Dispatch that sends all tokens to all devices with experts (the "ring" of JAX's MoE codes)."""

from __future__ import annotations

import functools

import jax
from jaxtyping import Array, Float

from moe_jax.dispatch.expert_function import RECEIVED, ExpertFunction, named
from moe_jax.dispatch.expert_mesh import Exchange, Local, over_mesh, own_experts
from moe_jax.dispatch.grouped import alone, apply_grouped, drop_groups, known_platform
from moe_jax.routing.plan import RoutingPlan


def all_gather(
  plan: RoutingPlan,
  x: Float[Array, "G S D"],
  experts: ExpertFunction,
  capacity: int | None,
  platform: str,
) -> Float[Array, "G S D"]:
  """Gathers all tokens along the axis "expert", runs each device's experts and reduce-scatters.

  In the forward pass, a device with T tokens receives (expert - 1) * T D numbers in the dtype of x,
  and as many float32 sums on the way back, where "expert" is the size of the axis. The backward
  pass sends the same in the opposite direction. The communication depends neither on K nor on the
  load. It is less than that of `ragged_all_to_all` if K is close to the number of devices, and this
  dispatcher is the best choice if the load is very uneven. Rows are computed as in `grouped`, so
  that dropless routing has no extra cost. See `over_mesh` for the other mesh axes. Without a mesh,
  or with expert=1, this is `grouped`.

  Args:
    plan: The assignments of G groups, as [G, A] arrays, including those that may overflow.
    x: The tokens.
    experts: The E experts as a pytree. Each device of the mesh axis "expert" holds E / expert.
    capacity: The number of slots per expert and group, C. None means dropless.
    platform: The platform of the devices that will run it, as in `jax.Device.platform`.

  Returns:
    The gate-weighted sum of the outputs of each token's experts, which is 0 for tokens without
    experts. It is accumulated in float32 and has the dtype of x.

  Raises:
    ConfigError: If the platform is unknown.
  """
  known_platform(platform)

  def apply(plan, x, experts):
    return apply_grouped(plan, x, experts, platform)

  return over_mesh(alone(capacity, platform), exchange_tokens(capacity, apply), plan, x, experts)


def exchange_tokens(capacity: int | None, apply: Local) -> Exchange:
  """Returns the computation of one device that gathers all tokens and scatters the sums.

  Args:
    capacity: The number of slots per expert and group, C. None means dropless.
    apply: Applies the experts of the device to tokens, given a plan of these experts alone.
  """

  def exchange(plan, x, experts, ways):
    del ways
    collect = functools.partial(jax.lax.all_gather, axis_name="expert", tiled=True)
    plan, x = jax.tree.map(collect, (drop_groups(plan, capacity), x))
    x = named(x, RECEIVED)
    y = apply(own_experts(plan, experts.num_experts), x, experts)
    return jax.lax.psum_scatter(y, "expert", tiled=True)

  return exchange
