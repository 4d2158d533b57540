"""Dropless dispatch that sends only assigned rows to other devices (MegaBlocks)."""

from __future__ import annotations

from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.dispatch.buffers import buffer_rows, fit_buffers
from moe_jax.dispatch.capacity import ranks
from moe_jax.dispatch.expert_function import RECEIVED, RETURNED, ExpertFunction, named
from moe_jax.dispatch.expert_mesh import over_mesh
from moe_jax.dispatch.grouped import GROUPED_MATMULS, alone, drop_groups, flatten, known_platform
from moe_jax.dispatch.routes import combine, make_routes, take
from moe_jax.dispatch.row_exchange import exchange_rows, has_ragged_all_to_all, piece
from moe_jax.errors import choose
from moe_jax.options import CAPACITY
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
  buffer_factor: Annotated[float, CAPACITY] | None = None,
) -> Float[Array, "G S D"]:
  """Sorts a device's assignments by expert and exchanges rows with the devices of the experts.

  This is the expert parallelism of MegaBlocks. The experts compute their rows as in `grouped`, and
  the results return to the devices of the tokens.

  In the forward pass with an even load, each device sends 2 (1 - 1/expert) * A D numbers in the
  dtype of x for its A assignments (there and back), where "expert" is the size of that mesh axis,
  and E counts. The backward pass sends as many numbers. The buffer for received rows has a static
  size, the worst case of expert times min(A, T E/expert) rows for T tokens per device, or
  `buffer_factor` A rows if that is less. If the exchange is padded, each device sends
  2 (expert - 1) * min(A, T E/expert) * D numbers. Capacity is applied before anything is sent, in
  the order of the plan, so that no device has priority over another. Rows move by gathers only, in
  the forward and in the backward pass. See `over_mesh` for the other mesh axes. Without a mesh, or
  with expert=1, this is `grouped`.

  Args:
    plan: The assignments of G groups, as [G, A] arrays, including those that may overflow.
    x: The tokens.
    experts: The E experts as a pytree. Each device of the mesh axis "expert" holds E / expert.
    capacity: The number of slots per expert and group, C. None means dropless, which is what this
      dispatcher is for.
    platform: The platform of the devices that will run it, as in `jax.Device.platform`.
    exchange: How rows are exchanged. "ragged" uses `jax.lax.ragged_all_to_all`, "padded" uses an
      all-to-all of padded buckets, and "auto" uses the ragged one if the devices have it (see
      `has_ragged_all_to_all`).
    buffer_factor: The rows of the buffer for received rows, as a multiple of the A assignments of a
      device, which is what arrives if the load is even. What does not fit is dropped, the lowest
      gates first (see `buffers.fit_buffers`), and counts as dropped in the metrics. None has room
      for the worst case and drops nothing.

  Returns:
    The gate-weighted sum of the outputs of each token's experts, which is 0 for tokens without
    experts. It is accumulated in float32 and has the dtype of x.

  Raises:
    ConfigError: If the platform or the exchange is unknown.
  """
  known_platform(platform)
  choose("model.moe.dispatcher.ragged_all_to_all.exchange", exchange, EXCHANGES)

  slots = x.shape[1] if capacity is None else min(capacity, x.shape[1])
  if buffer_factor is not None:
    # The capacity comes first, so that what it drops takes no room.
    plan, capacity = fit_buffers(drop_groups(plan, capacity), buffer_factor), None

  def spread(plan, x, experts, ways):
    # The largest number of rows that can go to one device. No token visits an expert twice, so a
    # group fills at most `slots` slots of each expert.
    most = x.shape[0] * min(plan.expert.shape[1], experts.num_experts * slots)
    room = buffer_rows(buffer_factor, plan.expert.size, ways * most)
    ragged = _is_ragged(exchange, platform)
    return _spread(
      drop_groups(plan, capacity), x, experts, ways, min(most, room), room, platform, ragged
    )

  return over_mesh(alone(capacity, platform), spread, plan, x, experts)


def _is_ragged(exchange: str, platform: str) -> bool:
  """Returns whether rows are exchanged by `jax.lax.ragged_all_to_all`."""
  if exchange != "auto":
    return exchange == "ragged"
  mesh = jax.sharding.get_abstract_mesh()
  kind = mesh.abstract_device.device_kind if mesh.abstract_device else platform
  return has_ragged_all_to_all(platform, kind, mesh.size)


def _spread(plan, x, experts, ways, most, room, platform, ragged):
  """Runs the dispatcher on one of `ways` devices.

  Each of these devices sends at most `most` rows to each other device, and receives at most `room`
  rows.
  """
  token, expert, gate = flatten(plan, x.shape[1])
  rank, _, load = ranks(expert, plan.num_experts)
  routes = make_routes(
    token,
    jnp.where(expert < plan.num_experts, rank, token.size),
    x.shape[0] * x.shape[1],
    token.size,
  )
  # The number of rows by [source, destination, expert on the destination].
  loads = jax.lax.all_gather(load, "expert").reshape(ways, ways, experts.num_experts)
  sizes = jnp.sum(loads, axis=-1)
  rows = exchange_rows(take(x.reshape(-1, x.shape[-1]), routes), sizes, room, most, ragged)
  rows = named(rows, RECEIVED)
  local = local_experts(loads[:, jax.lax.axis_index("expert")], room)
  # Here every received row is a token with one assignment. Its gate is 1, because the device that
  # sent the row applies the real gate, or 0 for the unused rest of the buffer.
  is_used = (local < experts.num_experts).astype(jnp.float32)
  done = GROUPED_MATMULS[platform](jnp.arange(room, dtype=jnp.int32), local, is_used, rows, experts)
  back = exchange_rows(done.astype(x.dtype), sizes.T, token.size, most, ragged)
  back = named(back, RETURNED)
  return combine(back, gate, routes).reshape(x.shape)


def local_experts(loads: Int[Array, "P E"], num_rows: int) -> Int[Array, "N"]:
  """Returns the local expert of each received row.

  Rows are ordered by source, then by expert, and there are loads[s, e] rows from source s for
  expert e.

  Args:
    loads: The number of rows by source and local expert.
    num_rows: The size of the buffer for received rows, N.

  Returns:
    Experts in [0, E]. E marks the unused rows at the end of the buffer.
  """
  count = loads.shape[1]
  number, _ = piece(loads.reshape(-1), num_rows)
  return jnp.where(number < loads.size, number % count, count).astype(jnp.int32)
