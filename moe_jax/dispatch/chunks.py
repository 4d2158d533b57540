"""Experts on ragged groups, computed by loops of plain matmuls on chunks of static sizes.

This is for platforms on which XLA has no grouped matmul. `size_classes` chooses the chunk sizes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.dispatch.expert_function import HIDDEN, RETURNED, ExpertFunction, named
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
  """Returns the gate-weighted sum of the outputs of each token's experts, in float32.

  Token rows are gathered chunk by chunk, when they are needed.

  Args:
    x: The tokens.
    gate: The combine weights of the assignments.
    experts: The experts as a pytree, which is differentiated through `experts.weights`.
    routes: The routes between tokens and the slots [0, rows + layout.classes[-1]).
    layout: The assignment of the slots to experts.
  """

  def chunk(w, e, start, size, out):
    return _put(out, experts.output(w, experts.hidden(w, _tokens(x, routes, start, size))), start)

  out = _fold(experts.weights, layout, chunk, _empty(routes, x, x[0]))
  return gather_sum(out, gate, routes)


def _forward(x, gate, experts, routes, layout):
  """Computes `apply_chunks` and saves the pre-activations and the outputs of the experts."""

  def chunk(w, e, start, size, carry):
    out, saved_pre = carry
    pre = experts.hidden(w, _tokens(x, routes, start, size))
    return _put(out, experts.output(w, pre), start), jax.tree.map(
      lambda saved, p: _put(saved, p, start), saved_pre, pre
    )

  # The shapes of the weights of one expert and of its pre-activations of one row.
  w = jax.eval_shape(lambda weights: jax.tree.map(lambda leaf: leaf[0], weights), experts.weights)
  pre = jax.eval_shape(
    lambda w, row: jax.tree.map(lambda p: p[0], experts.hidden(w, row)), w, x[:1]
  )
  # The buffers get different values, because XLA would merge equal constants into one buffer and
  # then have to copy it.
  saved_pre = [_empty(routes, x, leaf, value) for value, leaf in enumerate(jax.tree.leaves(pre))]
  saved_pre = jax.tree.unflatten(jax.tree.structure(pre), saved_pre)
  out, saved_pre = _fold(experts.weights, layout, chunk, (_empty(routes, x, x[0]), saved_pre))
  out, saved_pre = named(out, RETURNED), named(saved_pre, HIDDEN)
  return gather_sum(out, gate, routes), (x, gate, experts, routes, layout, out, saved_pre)


def _backward(residuals, d_y):
  """Returns the gradients of the arguments of `apply_chunks`, computed chunk by chunk."""
  x, gate, experts, routes, layout, out, saved_pre = residuals
  weights, pull_weights = jax.vjp(lambda experts: experts.weights, experts)
  gate_of_slot = read_assignments(gate, routes)

  def chunk(w, e, start, size, carry):
    d_rows, d_gate, d_weights = carry
    # The last chunk of an expert extends into rows of other experts. Their gradient is set to 0, so
    # that they do not add to the gradient of this expert's weights.
    is_own_row = start + jnp.arange(size) < layout.first[e] + layout.load[e]
    d_sum = _tokens(d_y, routes, start, size)
    d_gate_chunk = jnp.sum(d_sum * _rows(out, start, size).astype(jnp.float32), axis=-1)
    gate_of_row = jnp.where(is_own_row, _rows(gate_of_slot, start, size), 0)
    d_out = (gate_of_row[:, None] * d_sum).astype(out.dtype)
    pre = jax.tree.map(lambda saved: _rows(saved, start, size), saved_pre)
    _, pull_output = jax.vjp(experts.output, w, pre)
    d_w_output, d_pre = pull_output(d_out)
    _, pull_hidden = jax.vjp(experts.hidden, w, _tokens(x, routes, start, size))
    d_w_hidden, d_chunk = pull_hidden(d_pre)

    # Adding in place needs no accumulator of the size of one expert, which would have to be cleared
    # and copied.
    def add(total, a, b):
      return _put(
        total, (jax.lax.dynamic_index_in_dim(total, e, keepdims=False) + (a + b))[None], e
      )

    d_weights = jax.tree.map(add, d_weights, d_w_output, d_w_hidden)
    return _put(d_rows, d_chunk, start), _put(d_gate, d_gate_chunk, start), d_weights

  zeros = _empty(routes, x, x[0]), _empty(routes, x, gate[0]), jax.tree.map(jnp.zeros_like, weights)
  d_rows, d_gate, d_weights = _fold(weights, layout, chunk, zeros)
  d_x = gather_sum(d_rows, jnp.ones_like(gate), routes).astype(x.dtype)
  return d_x, read_slots(d_gate, routes).astype(gate.dtype), pull_weights(d_weights)[0], None, None


apply_chunks.defvjp(_forward, _backward)


def _fold(weights, layout, body, carry):
  """Folds `body(w, e, start, size, carry)` over all chunks, by class, then by expert, then by slot.

  Each call gets the weights w of expert e, the first slot of the chunk and its static size. There
  is one loop per size class, because the size must be static within a loop.
  """
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


def _tokens(x, routes, start, size):
  """Returns the token rows of the slots [start, start + size)."""
  return x.at[_rows(routes.token, start, size)].get(mode="promise_in_bounds")


def _rows(array, start, size):
  """Returns the rows [start, start + size) of `array`."""
  return jax.lax.dynamic_slice_in_dim(array, start, size)


def _put(array, rows, start):
  """Returns `array` with `rows` written to it from row `start` on."""
  return jax.lax.dynamic_update_slice_in_dim(array, rows, start, 0)


def _empty(routes, x, row, value=0):
  """Returns a buffer with one row of the shape and dtype of `row` per slot, filled with `value`.

  It is made from `x`, because under `jax.shard_map` the initial value of a loop must vary over the
  same mesh axes as the value after each iteration.
  """
  return jnp.full_like(x, value, row.dtype, (routes.token.size, *row.shape))
