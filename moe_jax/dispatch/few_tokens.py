"""Dispatch for the few tokens of a step of decoding, whose cost is to read the experts' weights."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.dispatch.expert_function import ExpertFunction
from moe_jax.dispatch.expert_mesh import over_mesh, own_experts
from moe_jax.dispatch.grouped import drop_groups, flatten, known_platform
from moe_jax.routing.plan import RoutingPlan

# The largest number of tokens for which a matmul with all of them takes about as long as reading
# the matrix.
FEW_TOKENS = 16


def few_tokens(
  plan: RoutingPlan,
  x: Float[Array, "G S D"],
  experts: ExpertFunction,
  capacity: int | None,
  platform: str,
) -> Float[Array, "G S D"]:
  """Applies each expert that is chosen at all to all tokens, and sums with the gates as weights.

  For few tokens, matmuls take as long as reading their matrices, so rows that nobody asked for cost
  nothing. The weights of at most min(E, A) experts are read, one after the other, which for one
  token are those of its K experts.

  On a mesh, tokens and not weights move: see `all_gather`, which moves them in the same way.

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

  def alone(plan, x, experts):
    return _apply_chosen(drop_groups(plan, capacity), x, experts)

  def exchange(plan, x, experts, ways):
    del ways
    collect = functools.partial(jax.lax.all_gather, axis_name="expert", tiled=True)
    plan, x = jax.tree.map(collect, (drop_groups(plan, capacity), x))
    y = _apply_chosen(own_experts(plan, experts.num_experts), x, experts)
    return jax.lax.psum_scatter(y, "expert", tiled=True)

  return over_mesh(alone, exchange, plan, x, experts)


def _apply_chosen(
  plan: RoutingPlan, x: Float[Array, "G S D"], experts: ExpertFunction
) -> Float[Array, "G S D"]:
  """Returns the gate-weighted sum of the outputs of each token's experts, in float32."""
  token, expert, gate = flatten(plan, x.shape[1])
  tokens = x.reshape(-1, x.shape[-1])
  num_experts = experts.num_experts
  # Assignments that name no expert are out of bounds and are dropped by the scatters.
  gates = jnp.zeros((num_experts, tokens.shape[0])).at[expert, token].add(gate, mode="drop")
  is_idle = jnp.ones(num_experts, bool).at[expert].set(False, mode="drop")
  chosen_first = jnp.argsort(is_idle, stable=True)

  def add(i, y):
    e = chosen_first[i]
    w = jax.tree.map(
      lambda leaf: jax.lax.dynamic_index_in_dim(leaf, e, keepdims=False), experts.weights
    )
    output = experts.output(w, experts.hidden(w, tokens))
    return y + gates[e][:, None] * output.astype(jnp.float32)

  # The factor makes the zeros vary over the mesh axes of what is added to them, as `jax.shard_map`
  # demands.
  zeros = jnp.zeros_like(tokens, jnp.float32) * gates[0][:, None]
  return jax.lax.fori_loop(0, min(num_experts, token.size), add, zeros).reshape(x.shape)
