"""Dispatch for the few tokens of a step of decoding, whose cost is to read the experts' weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.dispatch.all_gather import exchange_tokens
from moe_jax.dispatch.capacity import by_expert
from moe_jax.dispatch.expert_function import ExpertFunction
from moe_jax.dispatch.expert_mesh import over_mesh
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
  """Applies the experts that are chosen at all, one after the other.

  The weights of at most min(E, A) experts are read, which for one token are those of its K experts.
  On GPUs and TPUs each of them is applied to all tokens: with few tokens, a matmul takes as long as
  reading its matrix, so rows that nobody asked for cost nothing. On CPUs, an expert is applied to
  its own tokens, one by one.

  On a mesh, tokens and not weights move: see `all_gather`, which moves them in the same way. On
  CPUs, the function cannot be differentiated.

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
    return _apply_chosen(plan, x, experts, platform)

  def alone(plan, x, experts):
    return apply(drop_groups(plan, capacity), x, experts)

  return over_mesh(alone, exchange_tokens(capacity, apply), plan, x, experts)


def _apply_chosen(
  plan: RoutingPlan, x: Float[Array, "G S D"], experts: ExpertFunction, platform: str
) -> Float[Array, "G S D"]:
  """Returns the gate-weighted sum of the outputs of each token's experts, in float32."""
  token, expert, gate = flatten(plan, x.shape[1])
  tokens = x.reshape(-1, x.shape[-1])
  num_experts = experts.num_experts
  order, start, count = by_expert(expert, num_experts)
  chosen_first = jnp.argsort(count == 0, stable=True)
  add_rows = _one_by_one if platform == "cpu" else _all_at_once

  def add(i, y):
    e = chosen_first[i]
    w = jax.tree.map(
      lambda leaf: jax.lax.dynamic_index_in_dim(leaf, e, keepdims=False), experts.weights
    )

    def output(rows):
      return experts.output(w, experts.hidden(w, rows)).astype(jnp.float32)

    return add_rows(y, output, tokens, token[order], gate[order], start[e], count[e])

  # The factor makes the zeros vary over the mesh axes of what is added to them, as `jax.shard_map`
  # demands.
  zeros = jnp.zeros_like(tokens, jnp.float32) * gate[0]
  return jax.lax.fori_loop(0, min(num_experts, token.size), add, zeros).reshape(x.shape)


def _one_by_one(y, output, tokens, token, gate, start, count):
  """Adds an expert's part to the sums y [T, D], row by row.

  On a CPU, the second of these products with vectors finds the weights in the cache, whereas a
  matmul with few rows first copies them into another order.
  """

  def add(a, y):
    row = jax.lax.dynamic_slice_in_dim(tokens, token[a], 1)
    return y.at[token[a]].add(gate[a] * output(row)[0])

  return jax.lax.fori_loop(start, start + count, add, y)


def _all_at_once(y, output, tokens, token, gate, start, count):
  """Adds an expert's part to the sums y [T, D], which is 0 for tokens that do not visit it."""
  place = jnp.arange(token.size)
  is_own = (place >= start) & (place < start + count)
  gates = jnp.zeros(tokens.shape[0]).at[token].add(jnp.where(is_own, gate, 0.0))
  return y + gates[:, None] * output(tokens)
