"""Dropless dispatch, which sorts assignments by expert and applies one grouped matmul."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.dispatch.capacity import drop_overflow, ranks
from moe_jax.dispatch.chunks import apply_chunks
from moe_jax.dispatch.expert_function import RETURNED, ExpertFunction, named
from moe_jax.dispatch.expert_mesh import Local, over_mesh
from moe_jax.dispatch.ragged_matmul import ragged_matmul
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
  """Sorts the assignments of all groups by expert, so that each expert computes only its own rows.

  The method is that of MegaBlocks (arXiv 2211.15841).

  On TPUs, the number of rows that are computed is the number of assignments. On CPUs and GPUs it is
  typically 5 % larger, and never more than `size_classes.most_rows`. There, the rows of each expert
  are cut into chunks of a few static sizes, and each size is a loop of large plain matmuls, because
  XLA lowers `jax.lax.ragged_dot` on both to a matmul of every row with every expert, and on GPUs
  with a copy of every row for every expert. Rows move by gathers only, in the forward and in the
  backward pass. Only first derivatives are supported.

  On a mesh, tokens stay where they are, and each device sorts its own assignments. The axis
  "expert" only splits the storage of the experts. Their weights are gathered over it, which sends
  (1 - 1/expert) * 4 * 3EDF/tensor bytes per layer and pass and suits few experts and many tokens
  per device. `ragged_all_to_all` and `all_gather` move tokens instead. See `over_mesh` for the
  other mesh axes.

  Args:
    plan: The assignments of G groups, as [G, A] arrays, including those that may overflow.
    x: The tokens.
    experts: The experts as a pytree, which are applied once to the rows of all groups together.
    capacity: The number of slots per expert and group, C. None means dropless, which is what this
      dispatcher is for.
    platform: The platform of the devices that will run it, as in `jax.Device.platform`.

  Returns:
    The gate-weighted sum of the outputs of each token's experts, which is 0 for tokens without
    experts. It is accumulated in float32 and has the dtype of x.

  Raises:
    ConfigError: If the platform is unknown.
  """
  known_platform(platform)
  return over_mesh(alone(capacity, platform), None, plan, x, experts)


def alone(capacity: int | None, platform: str) -> Local:
  """Returns the function that computes `grouped` on one device that holds all experts.

  The result of the function is float32.
  """
  return lambda plan, x, experts: apply_grouped(drop_groups(plan, capacity), x, experts, platform)


def drop_groups(plan: RoutingPlan, capacity: int | None) -> RoutingPlan:
  """Applies `drop_overflow` to each group of a plan."""
  return jax.vmap(lambda p: drop_overflow(p, capacity))(plan)


def apply_grouped(
  plan: RoutingPlan, x: Float[Array, "G S D"], experts: ExpertFunction, platform: str
) -> Float[Array, "G S D"]:
  """Returns the gate-weighted sum of the outputs of each token's experts, in float32.

  It applies no capacity, so no assignment is dropped.
  """
  token, expert, gate = flatten(plan, x.shape[1])
  return GROUPED_MATMULS[platform](
    token, expert, gate, x.reshape(-1, x.shape[-1]), experts
  ).reshape(x.shape)


def flatten(
  plan: RoutingPlan, tokens: int
) -> tuple[Int[Array, "A"], Int[Array, "A"], Float[Array, "A"]]:
  """Merges a plan of G groups of S tokens into one group.

  Args:
    plan: The assignments of G groups, as [G, A] arrays.
    tokens: The number of tokens per group, S.

  Returns:
    (token, expert, gate), each with G*A entries. Tokens are numbered over all groups, in [0, G*S).
  """
  groups = plan.token.shape[0]
  token = plan.token + tokens * jnp.arange(groups, dtype=plan.token.dtype)[:, None]
  return token.reshape(-1), plan.expert.reshape(-1), plan.gate.reshape(-1)


def _by_chunks(token, expert, gate, x, experts):
  """Computes a grouped matmul by loops over chunks, with one slot per assignment."""
  rank, start, load = ranks(expert, experts.num_experts)
  chunk_layout = layout(load, token.size)
  # The last chunk may extend beyond the last assignment, into spare slots.
  slots = token.size + chunk_layout.classes[-1]
  # The layout orders experts by size class and not by index. Each assignment therefore moves by
  # the distance between the first rows of its expert in the two orders.
  slot = rank + (chunk_layout.first - start).at[expert].get(mode="clip")
  slot = jnp.where(expert < experts.num_experts, slot, slots)
  return apply_chunks(x, gate, experts, make_routes(token, slot, x.shape[0], slots), chunk_layout)


def _on_gpu(token, expert, gate, x, experts):
  """Computes a grouped matmul on a GPU, where one expert needs no loops over chunks."""
  by = _by_ragged_dot if experts.num_experts == 1 else _by_chunks
  return by(token, expert, gate, x, experts)


def _by_ragged_dot(token, expert, gate, x, experts):
  """Computes a grouped matmul by `ragged_matmul`, with one slot per assignment."""
  rank, _, load = ranks(expert, experts.num_experts)
  slot = jnp.where(expert < experts.num_experts, rank, token.size)
  routes = make_routes(token, slot, x.shape[0], token.size)
  done = experts.ragged(take(x, routes), load, ragged_matmul)
  return combine(named(done, RETURNED), gate, routes)


# Each function maps (token [A], expert [A], gate [A], x [T, D], experts) to the gate-weighted sums
# [T, D] in float32. Keys are the platforms of `jax.Device.platform`.
GROUPED_MATMULS = {
  "cpu": _by_chunks,
  "gpu": _on_gpu,
  "cuda": _on_gpu,
  "rocm": _on_gpu,
  "tpu": _by_ragged_dot,
}


def known_platform(platform: str) -> None:
  """Raises ConfigError for a platform without a grouped matmul."""
  if platform not in GROUPED_MATMULS:
    raise ConfigError("platform", platform, f"must be one of {', '.join(GROUPED_MATMULS)}")


def plan_layout(plan: RoutingPlan, capacity: int | None = None) -> Layout:
  """Returns the layout of the chunks of a concrete plan on a CPU or GPU.

  It tells how often the loops of a compiled program will run.
  """
  plan = drop_groups(plan, capacity)
  return layout(ranks(plan.expert.reshape(-1), plan.num_experts)[2], plan.expert.size)
