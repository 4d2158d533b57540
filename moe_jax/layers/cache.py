"""What layers keep of the tokens that a model has read, so that decoding reads each token once.

A model that is called with a `Cached` reads the next L tokens of its rows. Each layer keeps what
later tokens need of them in variables of the collection "cache": keys and values, the latent of
latent attention, or the state of an LSTM. Without a `Cached`, as in training, there are no such
variables.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Int

from moe_jax.sharding import constrain


# JAX rebuilds pytrees with placeholder leaves that are not arrays, so the checks of shapes at run
# time are switched off for this class.
@typing.no_type_check
class Cached(struct.PyTreeNode):
  """The places of the tokens of a call in rows of N places, which are read from left to right.

  Attributes:
    index: The place of the first of the L tokens, in [0, N - L]. All rows are at the same place, so
      that shorter rows begin with padding. The places before it have been read by earlier calls.
    segment_ids: Document of each place, from 1; 0 is padding. Places that have not been read yet
      have the id of the tokens that will come there.
  """

  index: Int[Array, ""]
  segment_ids: Int[Array, "B N"]


def remember(
  module: nn.Module,
  cached: Cached,
  new: Mapping[str, Array],
  axes: tuple[str | None, ...],
  window: int = 0,
) -> tuple[dict[str, Array], Int[Array, "M"]]:
  """Writes what a layer knows of L tokens to its cache, and returns what their queries may read.

  The cache has a slot for each of the N places of a row. With a window it has only as many slots
  as the window is long, and place p is in slot p modulo their number.

  Args:
    module: The layer, which owns the variables. The call must come from one of its compact methods.
    cached: The places of the tokens.
    new: Name -> array [B, L, ...] of the tokens.
    axes: The logical axes of the dimensions of these arrays after the second one.
    window: The number of last places that a query sees, its own included; 0 means all.

  Returns:
    The arrays [B, M, ...] by name, and the place of each of their M entries; it is negative where
    an entry is empty. An entry that has not been written yet has a place after the queries'.
  """
  length, size = next(iter(new.values())).shape[1], cached.segment_ids.shape[1]
  slots = min(window or size, size)
  variables = {}
  for name, value in new.items():
    shape = (value.shape[0], slots, *value.shape[2:])
    variables[name] = module.variable("cache", name, jnp.zeros, shape, value.dtype)

  def places(last):
    """Returns the place that each slot holds after the place `last` was written."""
    return last - (last - jnp.arange(slots)) % slots

  def put(name, value):
    variables[name].value = constrain(value, "batch", None, *axes)
    return variables[name].value

  last = cached.index + length - 1
  if length == 1 or slots == size:
    # No token overwrites what another token of this call sees, so the call reads the new cache.
    written = {
      name: put(name, _update(variables[name].value, value, cached.index % slots))
      for name, value in new.items()
    }
    return written, places(last)
  # The first tokens of the call see entries that its last tokens overwrite, so the call reads the
  # old cache and, beside it, the new entries.
  readable = {
    name: jnp.concatenate([variables[name].value, value], axis=1) for name, value in new.items()
  }
  at = jnp.concatenate([places(cached.index - 1), cached.index + jnp.arange(length)])
  tail = min(length, slots)
  into = (last - jnp.arange(tail)[::-1]) % slots
  for name, value in new.items():
    put(name, variables[name].value.at[:, into].set(value[:, -tail:], unique_indices=True))
  return readable, at


def _update(whole: Array, part: Array, start: Int[Array, ""]) -> Array:
  """Returns `whole` with `part` written from `start` on along the second axis."""
  return jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=1)


def visible_places(
  cached: Cached, segment_ids: Int[Array, "B L"], places: Int[Array, "M"], window: int = 0
) -> Bool[Array, "B L M"]:
  """Returns True where a query sees an entry of the cache, as `attention.visible` does.

  Args:
    cached: The places of the queries.
    segment_ids: Document of each query.
    places: The second result of `remember`.
    window: The number of last places that a query sees, its own included; 0 means all.
  """
  keys = jnp.take(cached.segment_ids, jnp.maximum(places, 0), axis=1)
  distance = distances(cached, segment_ids.shape[1], places)
  in_reach = (distance >= 0) & (places >= 0)
  if window:
    in_reach &= distance < window
  return in_reach & (segment_ids[:, :, None] == keys[:, None, :])


def distances(cached: Cached, length: int, places: Int[Array, "M"]) -> Int[Array, "L M"]:
  """Returns how many places each entry of the cache is before each of `length` queries.

  Within a document this is the difference of their positions.
  """
  return cached.index + jnp.arange(length)[:, None] - places
