"""Moves rows between tokens and slots by gathers only.

The derivative of a gather is usually a scatter-add. Here it is a gather by the inverse map, which
is computed once.
"""

from __future__ import annotations

import typing

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int


@typing.no_type_check
class Routes(struct.PyTreeNode):
  """The maps between T tokens, A assignments and P slots in both directions.

  Each slot holds the row of one token. Empty slots hold an arbitrary row, which is not used.

  Attributes:
    token: The token of each slot, in [0, T). It is arbitrary for empty slots.
    assignment: The assignment of each slot, or A for empty slots.
    slot: The slot of each assignment, or P for assignments without a slot.
    by_token: The assignments that have a slot, sorted by token, followed by the others.
    first: The position in `by_token` of each token's first assignment. The assignments of token t
      are by_token[first[t] : first[t] + count[t]].
    count: The number of assignments of each token that have a slot.
  """

  token: Int[Array, "P"]  # in [0, T)
  assignment: Int[Array, "P"]  # in [0, A]
  slot: Int[Array, "A"]  # in [0, P]
  by_token: Int[Array, "A"]
  first: Int[Array, "T"]
  count: Int[Array, "T"]


def make_routes(token: Int[Array, "A"], slot: Int[Array, "A"], tokens: int, slots: int) -> Routes:
  """Returns the routes of assignments with these tokens and slots.

  Args:
    token: The token of each assignment, in [0, T).
    slot: The slot of each assignment, or P if it has none. Each slot occurs at most once.
    tokens: The number of tokens, T.
    slots: The number of slots, P.
  """
  number = jnp.arange(token.size, dtype=jnp.int32)
  assignment = jnp.full((slots,), token.size, jnp.int32).at[slot].set(number, mode="drop")
  key = jnp.where(slot < slots, token, tokens)
  by_token = jnp.argsort(key)
  edges = jnp.searchsorted(key[by_token], jnp.arange(tokens + 1))
  return Routes(
    token=token.at[assignment].get(mode="clip"),
    assignment=assignment,
    slot=slot,
    by_token=by_token,
    first=edges[:-1],
    count=edges[1:] - edges[:-1],
  )


def gather_sum(
  rows: Float[Array, "P D"], weight: Float[Array, "A"], routes: Routes
) -> Float[Array, "T D"]:
  """Returns the sum of weight * row over the assignments of each token, in float32.

  One gather takes the j-th assignment of every token. The number of gathers is the largest number
  of assignments of a token, which is K for token choice.
  """
  slot, weight = routes.slot[routes.by_token], weight[routes.by_token]

  def add(j, total):
    exists = j < routes.count  # whether the token has a j-th assignment
    position = jnp.where(exists, routes.first + j, 0)
    row = rows.at[slot[position]].get(mode="clip").astype(jnp.float32)
    return total + jnp.where(exists[:, None], weight[position][:, None] * row, 0)

  start = jnp.zeros_like(rows, jnp.float32, (routes.count.shape[0], rows.shape[1]))
  return jax.lax.fori_loop(0, jnp.max(routes.count, initial=0), add, start)


def read_slots(values: Float[Array, "P"], routes: Routes) -> Float[Array, "A"]:
  """Returns the value of each assignment's slot, or 0 for assignments without a slot."""
  return values.at[routes.slot].get(mode="fill", fill_value=0)


def read_assignments(values: Float[Array, "A"], routes: Routes) -> Float[Array, "P"]:
  """Returns the value of each slot's assignment, or 0 for empty slots."""
  return values.at[routes.assignment].get(mode="fill", fill_value=0)


@jax.custom_vjp
def take(x: Float[Array, "T D"], routes: Routes) -> Float[Array, "P D"]:
  """Returns the token row of each slot."""
  return x[routes.token]


def _take_bwd(routes, d_rows):
  return gather_sum(d_rows, jnp.ones(routes.slot.shape, jnp.float32), routes).astype(
    d_rows.dtype
  ), None


take.defvjp(lambda x, routes: (take(x, routes), routes), _take_bwd)


@jax.custom_vjp
def combine(
  rows: Float[Array, "P D"], gate: Float[Array, "A"], routes: Routes
) -> Float[Array, "T D"]:
  """Returns the sum of gate * row over the assignments of each token, in float32."""
  return gather_sum(rows, gate, routes)


def _combine_bwd(residuals, d_y):
  rows, gate, routes = residuals
  d_rows = d_y[routes.token]
  d_gate = jnp.sum(d_rows * rows.astype(jnp.float32), axis=-1)
  return (
    (read_assignments(gate, routes)[:, None] * d_rows).astype(rows.dtype),
    read_slots(d_gate, routes),
    None,
  )


combine.defvjp(
  lambda rows, gate, routes: (combine(rows, gate, routes), (rows, gate, routes)), _combine_bwd
)
