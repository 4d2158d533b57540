"""Rows from tokens to slots and back by gathers only: the derivative of a gather is a gather by the
inverse map."""

from __future__ import annotations

import typing

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int


@typing.no_type_check
@struct.dataclass
class Routes:
  """Which token's row lies in which of P slots, in both directions. Empty slots hold some row;
  nobody reads it."""

  token: Int[Array, "P"]  # in [0, T); arbitrary for empty slots
  assignment: Int[Array, "P"]  # A for empty slots
  slot: Int[Array, "A"]  # P for assignments that have none
  by_token: Int[Array, "A"]  # the assignments that have a slot, sorted by token; then the others
  first: Int[Array, "T"]  # token t's assignments are by_token[first[t] : first[t] + count[t]]
  count: Int[Array, "T"]


def make_routes(token: Int[Array, "A"], slot: Int[Array, "A"], tokens: int, slots: int) -> Routes:
  """Routes from each assignment's token and slot: `slots` (= P) where it has none, else each slot
  at most once."""
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
  """The sum over each token's assignments of weight * row, in float32.

  Takes the j-th assignment of every token in one gather, for as many j as the busiest token has (K
  for token choice).
  """
  slot, weight = routes.slot[routes.by_token], weight[routes.by_token]

  def add(j, total):
    here = j < routes.count
    at = jnp.where(here, routes.first + j, 0)
    row = rows.at[slot[at]].get(mode="clip").astype(jnp.float32)
    return total + jnp.where(here[:, None], weight[at][:, None] * row, 0)

  start = jnp.zeros_like(rows, jnp.float32, (routes.count.shape[0], rows.shape[1]))
  return jax.lax.fori_loop(0, jnp.max(routes.count, initial=0), add, start)


def read_slots(values: Float[Array, "P"], routes: Routes) -> Float[Array, "A"]:
  """Each assignment's value; 0 for those that have no slot."""
  return values.at[routes.slot].get(mode="fill", fill_value=0)


def read_assignments(values: Float[Array, "A"], routes: Routes) -> Float[Array, "P"]:
  """Each slot's value; 0 for empty slots."""
  return values.at[routes.assignment].get(mode="fill", fill_value=0)


@jax.custom_vjp
def take(x: Float[Array, "T D"], routes: Routes) -> Float[Array, "P D"]:
  """Each slot's token row."""
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
  """The sum over each token's assignments of gate * row, in float32."""
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
