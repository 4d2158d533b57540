"""Experts on other devices, dropless: only rows that somebody asked for travel (MegaBlocks' expert
parallelism)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.dispatch.capacity import ranks
from moe_jax.dispatch.expert_function import ExpertFunction
from moe_jax.dispatch.expert_mesh import over_mesh
from moe_jax.dispatch.grouped import GROUPED_MATMULS, alone, drop_groups, flatten, known_platform
from moe_jax.dispatch.routes import combine, make_routes, take
from moe_jax.dispatch.row_exchange import exchange_rows, has_ragged_all_to_all, piece
from moe_jax.errors import choose
from moe_jax.routing.plan import RoutingPlan

EXCHANGES = ("auto", "ragged", "padded")


def ragged_all_to_all(
  plan: RoutingPlan,
  x: Float[Array, "G S D"],
  experts: ExpertFunction,
  capacity: int | None,
  platform: str,
  *,
  exchange: str = "auto",
) -> Float[Array, "G S D"]:
  """Sorts a device's assignments by expert, sends each to its expert's device, computes there as
  `grouped`, returns it.

  Each device sends, forward, 2 (1 - 1/expert) * A D in x's dtype for its A assignments at an even
  load (there and back), as much backward, and E counts. The room for what it receives is the worst
  case, which is static: expert times min(A, T E/expert) rows for T tokens a device. Where the
  exchange is padded, so is what travels: 2 (expert - 1) * min(A, T E/expert) * D. Capacity is
  applied before anything is sent, in the plan's order: no device's rows are served before
  another's. Rows move by gathers only, forward and backward. See `over_mesh` for the other axes;
  without a mesh, or with expert=1, it is `grouped`.

  Args:
    plan: of G groups, [G, A] arrays; overflow included.
    x: tokens.
    experts: a pytree; E of them, of which each device of the mesh axis "expert" holds E / expert.
    capacity: C; None = dropless, which is what this dispatcher is for.
    platform: of the devices that will run it, e.g. "cpu", as `jax.Device.platform` says.
    exchange: auto (see `has_ragged_all_to_all`), ragged, padded.

  Returns:
    The gate-weighted sum of each token's experts, summed in float32, in x's dtype; 0 for tokens
      that have none.

  Raises:
    ConfigError: unknown platform or exchange.
  """
  known_platform(platform)
  choose("model.moe.dispatcher.ragged_all_to_all.exchange", exchange, EXCHANGES)

  def spread(plan, x, experts, ways):
    slots = x.shape[1] if capacity is None else min(capacity, x.shape[1])
    most = x.shape[0] * min(
      plan.expert.shape[1], experts.num_experts * slots
    )  # no token visits an expert twice
    return _spread(
      drop_groups(plan, capacity), x, experts, ways, most, platform, _is_ragged(exchange, platform)
    )

  return over_mesh(alone(capacity, platform), spread, plan, x, experts)


def _is_ragged(exchange: str, platform: str) -> bool:
  if exchange != "auto":
    return exchange == "ragged"
  mesh = jax.sharding.get_abstract_mesh()
  kind = mesh.abstract_device.device_kind if mesh.abstract_device else platform
  return has_ragged_all_to_all(platform, kind, mesh.size)


def _spread(plan, x, experts, ways, most, platform, ragged):
  """The dispatcher on one of `ways` devices, each of which sends each other at most `most` rows."""
  token, expert, gate = flatten(plan, x.shape[1])
  rank, _, load = ranks(expert, plan.num_experts)
  routes = make_routes(
    token,
    jnp.where(expert < plan.num_experts, rank, token.size),
    x.shape[0] * x.shape[1],
    token.size,
  )
  loads = jax.lax.all_gather(load, "expert").reshape(
    ways, ways, experts.num_experts
  )  # [source, destination, E/ways]
  sizes = jnp.sum(loads, axis=-1)
  rows = exchange_rows(take(x.reshape(-1, x.shape[-1]), routes), sizes, ways * most, most, ragged)
  local = local_experts(loads[:, jax.lax.axis_index("expert")], ways * most)
  named = (local < experts.num_experts).astype(jnp.float32)
  done = GROUPED_MATMULS[platform](
    jnp.arange(ways * most, dtype=jnp.int32), local, named, rows, experts
  )
  back = exchange_rows(done.astype(x.dtype), sizes.T, token.size, most, ragged)
  return combine(back, gate, routes).reshape(x.shape)


def local_experts(loads: Int[Array, "P E"], num_rows: int) -> Int[Array, "N"]:
  """Each received row's expert: rows lie by source, then by expert, loads[s, e] of them; E behind
  the last."""
  count = loads.shape[1]
  number, _ = piece(loads.reshape(-1), num_rows)
  return jnp.where(number < loads.size, number % count, count).astype(jnp.int32)
