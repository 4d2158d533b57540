"""Dropless dispatch: assignments sorted by expert, then one grouped matmul. Nobody pads, nobody is
dropped."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.dispatch.capacity import drop_overflow, ranks
from moe_jax.dispatch.chunks import apply_chunks
from moe_jax.dispatch.expert_function import ExpertFunction
from moe_jax.dispatch.expert_mesh import Local, over_mesh
from moe_jax.dispatch.routes import combine, make_routes, take
from moe_jax.dispatch.size_classes import Layout, layout
from moe_jax.errors import ConfigError
from moe_jax.routing.plan import RoutingPlan


def grouped(
  plan: RoutingPlan,
  x: Float[Array, "G S D"],
  experts: ExpertFunction,
  capacity: int | None,
  platform: str,
) -> Float[Array, "G S D"]:
  """Sorts all groups' assignments by expert; each expert computes its own rows only (MegaBlocks,
  arXiv 2211.15841).

  FLOPs follow the load: as many rows are computed as there are assignments; on a CPU typically 5 %
  more, and never more than `size_classes.most_rows`. There, experts' rows are cut into chunks of a
  few static sizes, and each size is a loop of large plain matmuls, because XLA lowers
  `jax.lax.ragged_dot` on CPUs to a matmul of every row with every expert. Rows move by gathers
  only, forward and backward. First derivatives only. On a mesh tokens stay where they are, each
  device sorts its own, and the axis "expert" splits the experts' storage only: their weights are
  gathered over it, (1 - 1/expert) * 4 * 3EDF/tensor bytes a layer and pass, which suits few experts
  and many tokens a device. `ragged_all_to_all` and `all_gather` move tokens instead (see
  `over_mesh` for the other axes).

  Args:
    plan: of G groups, [G, A] arrays; overflow included.
    x: tokens.
    experts: a pytree, applied once, to all groups' rows together.
    capacity: C; None = dropless, which is what this dispatcher is for.
    platform: of the devices that will run it, e.g. "cpu", as `jax.Device.platform` says.

  Returns:
    The gate-weighted sum of each token's experts, summed in float32, in x's dtype; 0 for tokens
      that have none.

  Raises:
    ConfigError: unknown platform.
  """
  known_platform(platform)
  return over_mesh(alone(capacity, platform), None, plan, x, experts)


def alone(capacity: int | None, platform: str) -> Local:
  """`grouped` on one device that holds all that a plan names; in float32."""
  return lambda plan, x, experts: apply_grouped(drop_groups(plan, capacity), x, experts, platform)


def drop_groups(plan: RoutingPlan, capacity: int | None) -> RoutingPlan:
  """`drop_overflow` of each group."""
  return jax.vmap(lambda p: drop_overflow(p, capacity))(plan)


def apply_grouped(
  plan: RoutingPlan, x: Float[Array, "G S D"], experts: ExpertFunction, platform: str
) -> Float[Array, "G S D"]:
  """The gate-weighted sum of each token's experts, in float32; nobody is dropped."""
  token, expert, gate = flatten(plan, x.shape[1])
  return GROUPED_MATMULS[platform](
    token, expert, gate, x.reshape(-1, x.shape[-1]), experts
  ).reshape(x.shape)


def flatten(
  plan: RoutingPlan, tokens: int
) -> tuple[Int[Array, "A"], Int[Array, "A"], Float[Array, "A"]]:
  """A plan of G groups of `tokens` as one of one group: (token in [0, G*S), expert, gate)."""
  groups = plan.token.shape[0]
  token = plan.token + tokens * jnp.arange(groups, dtype=plan.token.dtype)[:, None]
  return token.reshape(-1), plan.expert.reshape(-1), plan.gate.reshape(-1)


def _by_chunks(token, expert, gate, x, experts):
  rank, start, load = ranks(expert, experts.num_experts)
  where = layout(load, token.size)
  slots = token.size + where.classes[-1]
  slot = rank + (where.first - start).at[expert].get(mode="clip")
  slot = jnp.where(expert < experts.num_experts, slot, slots)
  return apply_chunks(x, gate, experts, make_routes(token, slot, x.shape[0], slots), where)


def _by_ragged_dot(token, expert, gate, x, experts):
  rank, _, load = ranks(expert, experts.num_experts)
  slot = jnp.where(expert < experts.num_experts, rank, token.size)
  routes = make_routes(token, slot, x.shape[0], token.size)
  return combine(experts.ragged(take(x, routes), load), gate, routes)


# On T tokens: (token [A], expert [A], gate [A], x [T, D], experts) -> [T, D], in float32.
GROUPED_MATMULS = {
  "cpu": _by_chunks,
  "gpu": _by_ragged_dot,
  "cuda": _by_ragged_dot,
  "rocm": _by_ragged_dot,
  "tpu": _by_ragged_dot,
}


def known_platform(platform: str) -> None:
  """Raises ConfigError for a platform without a grouped matmul."""
  if platform not in GROUPED_MATMULS:
    raise ConfigError("platform", platform, f"must be one of {', '.join(GROUPED_MATMULS)}")


def plan_layout(plan: RoutingPlan, capacity: int | None = None) -> Layout:
  """How the experts' rows of a concrete plan are cut on a CPU: what the loops of a compiled program
  will do."""
  plan = drop_groups(plan, capacity)
  return layout(ranks(plan.expert.reshape(-1), plan.num_experts)[2], plan.expert.size)
