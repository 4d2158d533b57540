"""Experts on ragged groups by loops of plain matmuls on chunks of static sizes, where no grouped
matmul is at hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.dispatch.expert_function import ExpertFunction
from moe_jax.dispatch.routes import Routes, gather_sum, read_assignments, read_slots
from moe_jax.dispatch.size_classes import Layout


@jax.custom_vjp
def apply_chunks(
  x: Float[Array, "T D"],
  gate: Float[Array, "A"],
  experts: ExpertFunction,
  routes: Routes,
  layout: Layout,
) -> Float[Array, "T D"]:
  """The gate-weighted sum of each token's experts, in float32: rows are gathered chunk by chunk,
  where they are used.

  Args:
    x: tokens.
    gate: combine weights of the assignments.
    experts: a pytree; differentiated through `experts.weights`.
    routes: to the slots [0, rows + layout.classes[-1]), of which `layout` says whose they are.
    layout: of the slots.
  """

  def chunk(w, e, at, size, out):
    return _put(out, experts.output(w, experts.hidden(w, _tokens(x, routes, at, size))), at)

  out = _fold(experts.weights, layout, chunk, _empty(routes, x, x[0]))
  return gather_sum(out, gate, routes)


def _forward(x, gate, experts, routes, layout):
  """As `apply_chunks`; keeps the pre-activations and what the experts returned."""

  def chunk(w, e, at, size, carry):
    out, kept = carry
    pre = experts.hidden(w, _tokens(x, routes, at, size))
    return _put(out, experts.output(w, pre), at), jax.tree.map(
      lambda k, p: _put(k, p, at), kept, pre
    )

  w = jax.eval_shape(lambda weights: jax.tree.map(lambda leaf: leaf[0], weights), experts.weights)
  pre = jax.eval_shape(
    lambda w, row: jax.tree.map(lambda p: p[0], experts.hidden(w, row)), w, x[:1]
  )
  kept = [_empty(routes, x, leaf, value) for value, leaf in enumerate(jax.tree.leaves(pre))]
  kept = jax.tree.unflatten(jax.tree.structure(pre), kept)
  out, kept = _fold(experts.weights, layout, chunk, (_empty(routes, x, x[0]), kept))
  return gather_sum(out, gate, routes), (x, gate, experts, routes, layout, out, kept)


def _backward(residuals, d_y):
  x, gate, experts, routes, layout, out, kept = residuals
  weights, pull_weights = jax.vjp(lambda experts: experts.weights, experts)
  gate_of_slot = read_assignments(gate, routes)

  def chunk(w, e, at, size, carry):
    d_rows, d_gate, d_weights = carry
    own = at + jnp.arange(size) < layout.first[e] + layout.load[e]
    d_sum = _tokens(d_y, routes, at, size)
    d_gate_chunk = jnp.sum(d_sum * _rows(out, at, size).astype(jnp.float32), axis=-1)
    d_out = (jnp.where(own, _rows(gate_of_slot, at, size), 0)[:, None] * d_sum).astype(out.dtype)
    _, pull_output = jax.vjp(experts.output, w, jax.tree.map(lambda k: _rows(k, at, size), kept))
    d_w_output, d_pre = pull_output(d_out)
    _, pull_hidden = jax.vjp(experts.hidden, w, _tokens(x, routes, at, size))
    d_w_hidden, d_chunk = pull_hidden(d_pre)

    def add(total, a, b):  # In place: no accumulator of one expert's size to clear and to copy.
      return _put(
        total, (jax.lax.dynamic_index_in_dim(total, e, keepdims=False) + (a + b))[None], e
      )

    d_weights = jax.tree.map(add, d_weights, d_w_output, d_w_hidden)
    return _put(d_rows, d_chunk, at), _put(d_gate, d_gate_chunk, at), d_weights

  start = _empty(routes, x, x[0]), _empty(routes, x, gate[0]), jax.tree.map(jnp.zeros_like, weights)
  d_rows, d_gate, d_weights = _fold(weights, layout, chunk, start)
  d_x = gather_sum(d_rows, jnp.ones_like(gate), routes).astype(x.dtype)
  return d_x, read_slots(d_gate, routes).astype(gate.dtype), pull_weights(d_weights)[0], None, None


apply_chunks.defvjp(_forward, _backward)


def _fold(weights, layout, body, carry):
  """Folds `body(weights of e, e, first slot, size, carry)` over all chunks: by class, by expert, by
  slot."""
  for m, size in enumerate(layout.classes):

    def expert(i, carry, size=size):
      e = layout.order[i]
      w = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, e, keepdims=False), weights)

      def step(c, carry):
        return body(w, e, layout.first[e] + c * size, size, carry)

      with jax.named_scope(f"chunks_of_{size}"):
        return jax.lax.fori_loop(0, layout.chunks[e], step, carry)

    with jax.named_scope(f"experts_of_{size}"):
      carry = jax.lax.fori_loop(layout.bounds[m], layout.bounds[m + 1], expert, carry)
  return carry


def _tokens(x, routes, at, size):
  return x.at[_rows(routes.token, at, size)].get(mode="promise_in_bounds")


def _rows(array, at, size):
  return jax.lax.dynamic_slice_in_dim(array, at, size)


def _put(array, rows, at):
  return jax.lax.dynamic_update_slice_in_dim(array, rows, at, 0)


def _empty(routes, x, row, value=0):
  """Room for something like `row` in every slot. (Equal constants become one buffer and copies of
  it.)

  Made from `x` because, under `jax.shard_map`, a loop's first value must vary between devices as
  its last one does.
  """
  return jnp.full_like(x, value, row.dtype, (routes.token.size, *row.shape))
