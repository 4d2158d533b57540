"""Attention by blocks of queries, which never holds the scores of all queries and keys at once."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.layers.attend import attend

# A causal row is cut into at most this many spans of blocks, and each block reads the keys up to
# the end of its span. The program has a loop over blocks for each span, so that more spans save
# FLOPs and take longer to compile.
MOST_SPANS = 8
# Each span has at least so many blocks. XLA would replace a loop over one block by its body, and on
# CPUs it would then merge the body with the one that computes it again in the backward pass.
_BLOCKS_OF_A_SPAN = 2
# The segment of the queries that fill up the last block. No key has it.
_NOBODY = -2


class Tokens(NamedTuple):
  """What is known of some queries, or of some keys. The second axis of each array is the tokens'.

  Attributes:
    features: The queries [B, L, K, G, P], or the keys [B, L, K, P].
    segments: Document of each token, [B, L].
    places: Place of each token in its row, [1, L].
    positions: Position of each token in its document, [B, L].
    values: The values [B, L, K, U] of keys; None for queries.
  """

  features: Array
  segments: Array
  places: Array
  positions: Array
  values: Array | None = None


def uses_blocks(length: int, block: int) -> bool:
  """Returns whether `length` queries are computed in blocks of `block`; a block of 0 means never.

  Fewer queries than two spans of blocks are computed at once.
  """
  return 0 < 2 * _BLOCKS_OF_A_SPAN * block <= length


def attend_in_blocks(
  q: Float[Array, "B Lq K G P"],
  k: Float[Array, "B Lk K P"],
  v: Float[Array, "B Lk K U"],
  query_segments: Int[Array, "B Lq"],
  key_segments: Int[Array, "B Lk"],
  *,
  block: int,
  causal: bool = True,
  window: int = 0,
  positions: Int[Array, "B Lq"] | None = None,
  bias: Callable[[Array], Array] | None = None,
  sink: Float[Array, "K G"] | None = None,
  drop: Callable[[Int[Array, ""], Array], Array] | None = None,
) -> Float[Array, "B Lq K G U"]:
  """Returns what `attend` returns, and computes the scores of one block of queries at a time.

  Each block is computed again in the backward pass, for which only the arguments are saved. The
  largest array that exists has the scores of a block, B * heads * block * keys numbers in float32.

  How many keys a block reads is known at compile time:

  - all of them, if `causal` is False;
  - window - 1 + block, if that is at most half of the row;
  - else those up to the end of the block's span. With n spans of equal size, 1/2 + 1/(2 n) of the
    FLOPs remain. There is a span for every two blocks, and at most `MOST_SPANS`.

  Args:
    q: Queries, already scaled, of which G read each of the K key-value heads.
    k: Keys.
    v: Values. Their width U may differ from the width P of queries and keys.
    query_segments: Document of each query, from 0. A query sees the keys of its own document.
    key_segments: Document of each key. Nobody sees a key whose document is -1.
    block: Number of queries in a block. It need not divide Lq.
    causal: Whether a query sees no later keys. Queries and keys must then be the same tokens.
    window: The number of last keys that a query sees, its own included; 0 means no limit. It has no
      effect unless `causal`.
    positions: Position of each token in its document; only read by `bias`, in self-attention.
    bias: (query's position minus key's position, [B, queries, keys]) -> [#B, K, G, queries, keys],
      which is added to the scores. None adds nothing.
    sink: See `attend`.
    drop: (index of the block, weights) -> weights after dropout. None means no dropout.

  Returns:
    Averages of the values. A query that sees no key gets 0.
  """
  length, keys = q.shape[1], k.shape[1]
  blocks = -(-length // block)
  position = jnp.zeros((1, max(length, keys)), jnp.int32) if positions is None else positions
  of_keys = Tokens(k, key_segments, jnp.arange(keys)[None], position[:, :keys], v)
  queries = Tokens(
    _blocks(q, blocks, block),
    _blocks(query_segments, blocks, block, fill=_NOBODY),
    _blocks(jnp.arange(blocks * block)[None], blocks, block),
    _blocks(position[:, :length], blocks, block),
  )

  # The keys are chosen inside, so that the backward pass saves all keys once and no slices of them.
  @functools.partial(jax.checkpoint, static_argnums=0)
  def one_block(choose, index, queries, of_keys):
    chosen = choose(of_keys, index * block)
    mask = _visible(queries, chosen, causal, window)
    distance = queries.positions[:, :, None] - chosen.positions[:, None, :]
    mixed = attend(
      queries.features,
      chosen.features,
      chosen.values,
      mask,
      bias=bias(distance) if bias else None,
      sink=sink,
      drop=functools.partial(drop, index) if drop else _unchanged,
    )
    # A query that sees no key would otherwise get the plain average of all values.
    return jnp.where(jnp.any(mask, axis=-1)[:, :, None, None, None], mixed, 0)

  def run(choose, first=0, last=blocks):
    """Computes the blocks from `first` on and before `last`."""
    return jax.lax.map(
      lambda each: one_block(choose, *each, of_keys),
      (jnp.arange(first, last), jax.tree.map(lambda array: array[first:last], queries)),
    )

  width = window - 1 + block
  if not causal:
    mixed = run(_all)
  elif window and width <= length // 2:
    mixed = run(functools.partial(_near, reach=window - 1, width=width))
  else:
    spans = min(MOST_SPANS, max(blocks // _BLOCKS_OF_A_SPAN, 1))
    edges = [blocks * i // spans for i in range(spans + 1)]
    mixed = jnp.concatenate(
      [
        run(functools.partial(_until, end=last * block), first, last)
        for first, last in itertools.pairwise(edges)
      ]
    )
  whole = jnp.moveaxis(mixed, 0, 1).reshape(q.shape[0], blocks * block, *mixed.shape[3:])
  return whole[:, :length]


def _blocks(array: Array, count: int, size: int, fill: int = 0) -> Array:
  """Cuts the second axis into `count` blocks of `size`, whose axis becomes the first.

  `fill` fills up the last block.
  """
  spare = [(0, 0)] * array.ndim
  spare[1] = (0, count * size - array.shape[1])
  padded = jnp.pad(array, spare, constant_values=fill)
  return jnp.moveaxis(padded.reshape(array.shape[0], count, size, *array.shape[2:]), 1, 0)


def _visible(queries: Tokens, keys: Tokens, causal: bool, window: int) -> Bool[Array, "B Q N"]:
  """Returns True where a query of a block sees a key, as `attend.visible` does."""
  seen = queries.segments[:, :, None] == keys.segments[:, None, :]
  if causal:
    distance = queries.places[:, :, None] - keys.places[:, None, :]
    seen &= distance >= 0
    if window:
      seen &= distance < window
  return seen


def _all(keys: Tokens, place: Int[Array, ""]) -> Tokens:
  """Returns all keys."""
  del place
  return keys


def _until(keys: Tokens, place: Int[Array, ""], end: int) -> Tokens:
  """Returns the keys before the place `end`, wherever the block begins."""
  del place
  return jax.tree.map(lambda array: array[:, :end], keys)


def _near(keys: Tokens, place: Int[Array, ""], reach: int, width: int) -> Tokens:
  """Returns `width` keys, among which are the `reach` ones before `place`."""
  # Near the ends of the row the slice would extend beyond them, and is moved inwards.
  start = jnp.clip(place - reach, 0, keys.features.shape[1] - width)
  return jax.tree.map(lambda array: jax.lax.dynamic_slice_in_dim(array, start, width, axis=1), keys)


def _unchanged(weights: Array) -> Array:
  """Returns the weights without dropout."""
  return weights
