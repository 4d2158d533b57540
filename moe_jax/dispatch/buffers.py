"""Bounded buffers for the rows that devices with experts receive.

Without a bound, such a buffer must have room for the case that all tokens choose experts of one
device. With a bound, the rows that do not fit are dropped before anything is sent, those with the
lowest gates first.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.dispatch.capacity import ranks
from moe_jax.routing.plan import RoutingPlan
from moe_jax.sharding import spec


def buffer_rows(factor: float | None, assignments: int, worst: int) -> int:
  """Returns the number of rows of a device's buffer.

  Args:
    factor: The rows as a multiple of `assignments`. None means `worst`.
    assignments: The number of assignments of a device's own tokens, which is also the number of
      rows that it receives if the load of all devices is even.
    worst: The number of rows that a device receives at most.
  """
  return worst if factor is None else min(math.ceil(factor * assignments), worst)


def fit_buffers(plan: RoutingPlan, factor: float | None) -> RoutingPlan:
  """Drops the assignments that find no room in the buffer of the device that holds their expert.

  The devices of the mesh axis "expert" that exchange rows with each other form a ring. Of all
  assignments of a ring to a device, those with the highest gates fit, wherever their tokens are;
  equal gates fit in the order of the groups. Dropped assignments get `expert` E and gate 0. Every
  device looks at the gates and experts of the whole ring, which are 8 bytes an assignment.

  Nothing is dropped without a mesh, and where the axis "expert" does not split the groups of
  tokens, because there is no exchange then.

  Args:
    plan: The assignments of all groups, [G, A].
    factor: The rows of a buffer as a multiple of the assignments of a device; see `buffer_rows`.
      None drops nothing.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if factor is None or mesh.empty or dict(mesh.shape).get("expert", 1) == 1:
    return plan
  ways = mesh.shape["expert"]
  groups = spec(("group",), (plan.expert.shape[0],), dict(mesh.shape))
  if "expert" not in jax.tree.leaves(tuple(groups)) or plan.num_experts % ways:
    return plan

  def own(expert, gate):
    """Returns the experts of this device's assignments, or E for those that are dropped."""
    room = buffer_rows(factor, expert.size, ways * expert.size)
    ring = functools.partial(jax.lax.all_gather, axis_name="expert", tiled=True)
    fits = _fits(ring(expert).reshape(-1) // (plan.num_experts // ways), ring(gate), ways, room)
    mine = jax.lax.dynamic_slice_in_dim(
      fits, jax.lax.axis_index("expert") * expert.size, expert.size
    )
    return jnp.where(mine.reshape(expert.shape), expert, plan.num_experts)

  expert = jax.shard_map(own, in_specs=(groups, groups), out_specs=groups)(
    plan.expert, jax.lax.stop_gradient(plan.gate)
  )
  return plan.replace(expert=expert, gate=jnp.where(expert < plan.num_experts, plan.gate, 0.0))


def _fits(
  device: Int[Array, "N"], gate: Float[Array, "..."], ways: int, room: int
) -> Bool[Array, "N"]:
  """Returns which of the assignments of a ring are among the `room` highest gates of a device.

  Args:
    device: The device of each assignment. `ways` and more stand for none.
    gate: The gates, N numbers of any shape.
    ways: The number of devices.
    room: The number of rows of each device's buffer.
  """
  best_first = jnp.argsort(-gate.reshape(-1), stable=True)
  chosen = jnp.minimum(device[best_first], ways)
  rank, start, _ = ranks(chosen, ways)
  place = rank - start[jnp.minimum(chosen, ways - 1)]
  return (
    jnp.zeros(device.shape, bool)
    .at[best_first]
    .set((place < room) & (chosen < ways), unique_indices=True)
  )
