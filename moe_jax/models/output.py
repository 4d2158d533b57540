"""The output of language models: logits, or the cross-entropy without logits of all tokens.

The logits of B rows of L tokens over V entries are often the largest array of a step. Where they
are only needed for the cross-entropy, they are computed for one chunk of the vocabulary at a time,
and again in the backward pass.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moe_jax.sharding import constrain, spec

# Nats and log Z of each position.
Nats = tuple[Float[Array, "B L"], Float[Array, "B L"]]


def output(
  x: Float[Array, "B L D"],
  head: Float[Array, "D V"],
  targets: Int[Array, "B L"] | None = None,
  chunk: int = 0,
) -> Float[Array, "B L V"] | Nats:
  """Returns float32 logits, or what `token_nats` makes of them if there are targets.

  Args:
    x: The output of the last layer.
    head: The output projection, in the dtype of `x`.
    targets: The token that each position should predict; None asks for logits.
    chunk: Entries of the vocabulary whose logits exist at the same time, if `uses_chunks` and if
      there are targets.
  """
  if targets is not None and uses_chunks(head.shape[1], chunk):
    return nats_by_chunks(x, head, targets, chunk)
  logits = jnp.einsum("bld,dv->blv", x, head, preferred_element_type=jnp.float32)
  logits = constrain(logits, "batch", "length", "act_vocab")
  return logits if targets is None else token_nats(logits, targets)


def token_nats(
  logits: Float[Array, "B L V"], targets: Int[Array, "B L"] | Int[np.ndarray, "B L"]
) -> Nats:
  """Returns `(-log p(target), log Z)` for each position, in float32."""
  logits = logits.astype(jnp.float32)
  log_z = jax.nn.logsumexp(logits, axis=-1)
  return log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0], log_z


def uses_chunks(vocab_size: int, chunk: int) -> bool:
  """Returns whether the logits of a vocabulary are computed in chunks; a chunk of 0 means never.

  A vocabulary of fewer entries than two chunks is not cut.
  """
  return 0 < 2 * chunk <= vocab_size


class _Cut(NamedTuple):
  """How a vocabulary is cut.

  Devices that share the vocabulary each hold a part of it. Each part is cut into the same number of
  chunks, so that every device has work in every chunk and nothing moves between devices. The last
  chunks may extend beyond the part.

  Attributes:
    parts: Number of devices that share the vocabulary, T.
    part: Entries of a part.
    chunks: Number of chunks of a part, N.
    size: Entries of a chunk of a part, C.
  """

  parts: int
  part: int
  chunks: int
  size: int


def nats_by_chunks(
  x: Float[Array, "B L D"], head: Float[Array, "D V"], targets: Int[Array, "B L"], chunk: int
) -> Nats:
  """Returns `token_nats` of the logits x @ head, of which only a chunk exists at any time.

  The maximum, the sum of exponentials and the target's logit are kept up to date from chunk to
  chunk (Milakov and Gimelshein 2018, arXiv 1805.02867, Alg. 3). The backward pass computes each
  chunk again, so that the matmuls of the output projection cost 4/3 of their FLOPs.

  Args:
    x: The output of the last layer.
    head: The output projection, in the dtype of `x`.
    targets: The token that each position should predict.
    chunk: Entries of the vocabulary of a chunk, over all devices that share the vocabulary.
  """
  vocab_size = head.shape[1]
  parts = _shares(vocab_size)
  part = vocab_size // parts
  chunks = -(-vocab_size // chunk)
  return _nats(_Cut(parts, part, chunks, -(-part // chunks)), x, head, targets)


def _shares(vocab_size: int) -> int:
  """Returns the number of devices of the current mesh that share the vocabulary of logits."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return 1
  (axes,) = spec(("act_vocab",), (vocab_size,), dict(mesh.shape))
  names = () if axes is None else (axes,) if isinstance(axes, str) else axes
  return math.prod(mesh.shape[name] for name in names)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nats(cut: _Cut, x: Array, head: Array, targets: Array) -> Nats:
  """Computes `nats_by_chunks`."""

  def add(carry: tuple[Array, Array, Array], indexed) -> tuple[tuple[Array, Array, Array], None]:
    highest, total, at_target = carry
    logits, is_target = _chunk(cut, x, targets, *indexed)
    before, highest = highest, jnp.maximum(highest, jnp.max(logits, axis=-1))
    total = total * jnp.exp(before - highest)
    total += jnp.sum(jnp.exp(logits - highest[..., None]), axis=-1)
    at_target += jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    return (highest, total, at_target), None

  # Each part has sums of its own until the end, so that devices exchange nothing in the loop.
  zeros = constrain(jnp.zeros((*targets.shape, cut.parts)), "batch", "length", "act_vocab")
  (highest, total, at_target), _ = jax.lax.scan(
    add, (jnp.full_like(zeros, -jnp.inf), zeros, zeros), _chunks_of(cut, head)
  )
  overall = jnp.max(highest, axis=-1)
  total = jnp.sum(total * jnp.exp(highest - overall[..., None]), axis=-1)
  log_z = overall + jnp.log(total)
  return log_z - jnp.sum(at_target, axis=-1), log_z


def _forward(cut, x, head, targets):
  """Computes `_nats`, and saves its arguments and log Z."""
  # Pyright takes the result of a `jax.custom_vjp` for an object without a length.
  result: Any = _nats(cut, x, head, targets)
  return result, (x, head, targets, result[1])


def _backward(cut, residuals, gradients):
  """Returns the gradients of the last layer's output and of the output projection."""
  x, head, targets, log_z = residuals
  # The gradient of a logit is (d_nats + d_log_z) p, less d_nats if it is the target's.
  d_nats, d_log_z = gradients
  of_p = (d_nats + d_log_z)[..., None, None]

  def add(d_x, indexed):
    index, columns = indexed
    logits, is_target = _chunk(cut, x, targets, index, columns)
    p = jnp.exp(logits - log_z[..., None, None])
    d_logits = of_p * p - jnp.where(is_target, d_nats[..., None, None], 0)
    d_x += jnp.einsum("bltv,dtv->tbld", d_logits, columns, preferred_element_type=jnp.float32)
    d_columns = jnp.einsum("bld,bltv->dtv", x, d_logits, preferred_element_type=jnp.float32)
    d_columns = constrain(d_columns, "embed", "act_vocab", None).astype(head.dtype)
    return constrain(d_x, "act_vocab", "batch", "length", "act_embed"), d_columns

  # Each part has a sum of its own, as in the forward pass.
  zeros = constrain(jnp.zeros((cut.parts, *x.shape)), "act_vocab", "batch", "length", "act_embed")
  d_x, d_head = jax.lax.scan(add, zeros, _chunks_of(cut, head))
  d_head = jnp.moveaxis(d_head, 0, 2).reshape(len(head), cut.parts, -1)[..., : cut.part]
  return jnp.sum(d_x, axis=0).astype(x.dtype), d_head.reshape(head.shape), None


_nats.defvjp(_forward, _backward)


def _chunks_of(cut: _Cut, head: Float[Array, "D V"]) -> tuple[Array, Float[Array, "N D T C"]]:
  """Returns the index of each chunk, and its columns of the output projection."""
  columns = head.reshape(len(head), cut.parts, cut.part)
  spare = cut.chunks * cut.size - cut.part
  columns = jnp.pad(columns, ((0, 0), (0, 0), (0, spare)))
  columns = columns.reshape(len(head), cut.parts, cut.chunks, cut.size)
  return jnp.arange(cut.chunks), jnp.moveaxis(columns, 2, 0)


def _chunk(
  cut: _Cut, x: Array, targets: Array, index: Array, columns: Float[Array, "D T C"]
) -> tuple[Float[Array, "B L T C"], Array]:
  """Returns the logits of a chunk, and for each whether it is the target's.

  Logits of what extends beyond a part are -inf.

  Args:
    cut: How the vocabulary is cut.
    x: The output of the last layer.
    targets: The token that each position should predict.
    index: The index of the chunk.
    columns: Its columns of the output projection.
  """
  logits = jnp.einsum("bld,dtv->bltv", x, columns, preferred_element_type=jnp.float32)
  logits = constrain(logits, "batch", "length", "act_vocab", None)
  place = index * cut.size + jnp.arange(cut.size)
  is_entry = place < cut.part
  token = cut.part * jnp.arange(cut.parts)[:, None] + place
  is_target = is_entry & (token == targets[..., None, None])
  return jnp.where(is_entry, logits, -jnp.inf), is_target
