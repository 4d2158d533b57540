"""Decoding with a cache: the prompts are read at once, and then one token of each row at a time."""

from __future__ import annotations

import functools
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Int, Key

from moe_jax.generation.sampling import Sampling, draw
from moe_jax.layers import Cached
from moe_jax.sharding import constrain


# JAX rebuilds pytrees with placeholder leaves that are not arrays, so the checks of shapes at run
# time are switched off for this class and the next.
@typing.no_type_check
class _Rows(struct.PyTreeNode):
  """What does not change while B rows are continued.

  Attributes:
    variables: Parameters and router state of the model.
    segment_ids: 0 for the padding before each prompt and 1 for all other places, [B, N].
    keys: The data of a PRNG key for each of the n tokens that are drawn, [n, 2].
    allowed: See `sampling.draw`.
  """

  variables: Any
  segment_ids: Any
  keys: Any
  allowed: Bool[Array, "W"] | None


@typing.no_type_check
class _Drawn(struct.PyTreeNode):
  """What changes with each token.

  Attributes:
    cache: The collection "cache" of the model.
    tokens: The tokens that were drawn, [B, n]; -1 where none has been drawn.
    count: The number of tokens of each row that have been drawn, counting rows that have stopped.
    stopped: Whether each row has drawn a stop token, [B].
  """

  cache: Any
  tokens: Int[Array, "B n"]
  count: Int[Array, ""]
  stopped: Bool[Array, "B"]


def generate_tokens(
  model: nn.Module,
  variables: Mapping[str, Any],
  prompts: Sequence[Sequence[int]],
  keys: Key[Array, "n"],
  sampling: Sampling,
  *,
  stop: Sequence[int] = (),
  allowed: Bool[np.ndarray, "W"] | None = None,
  encoder: Mapping[str, Int[np.ndarray, "B M"]] | None = None,
  room: int = 1,
) -> Int[np.ndarray, "B n"]:
  """Continues prompts of any lengths by up to n tokens, in one compiled program.

  Each token is routed by itself and no assignment to an expert is dropped, whatever the capacity
  factor in training is (`LayerContext.dropless`). A mesh that is set by `jax.set_mesh` is used.

  Args:
    model: A `LanguageModel` or an `EncoderDecoder`. With `scan_layers`, each step copies the
      weights and the cache of each layer; `models.unroll` avoids that.
    variables: Parameters and router state, as `model.apply` takes them.
    prompts: At least one token for each row; of an encoder-decoder, the beginnings of the targets.
    keys: A typed PRNG key for each of the n >= 1 tokens, such as `jax.random.split(key, n)`.
    sampling: How tokens are drawn.
    stop: Tokens after which a row ends.
    allowed: See `sampling.draw`.
    encoder: The sources of an encoder-decoder; see `EncoderDecoder`.
    room: The least number of places for a prompt, >= 1. Calls whose prompts have different lengths
      up to `room` share a compiled program.

  Returns:
    The drawn tokens, without the prompts. After a stop token, a row has -1.

  Raises:
    ValueError: A prompt is empty, or no token is allowed.
  """
  rows, tokens = _rows(variables, prompts, keys, allowed, room)
  how = _How(model, sampling, tuple(stop))
  return np.asarray(_all_at_once(how, rows, tokens, encoder))


def stream_tokens(
  model: nn.Module,
  variables: Mapping[str, Any],
  prompts: Sequence[Sequence[int]],
  keys: Key[Array, "n"],
  sampling: Sampling,
  *,
  at_once: int = 1,
  stop: Sequence[int] = (),
  allowed: Bool[np.ndarray, "W"] | None = None,
  encoder: Mapping[str, Int[np.ndarray, "B M"]] | None = None,
) -> Iterator[Int[np.ndarray, "B m"]]:
  """Yields the tokens of `generate_tokens` while they are drawn, up to `at_once` in each array.

  The caller may stop reading at any time. The other arguments are those of `generate_tokens`.
  """
  rows, tokens = _rows(variables, prompts, keys, allowed)
  how = _How(model, sampling, tuple(stop))
  drawn, seen = _start(how, rows, tokens, encoder), 0
  while seen < len(keys):
    if seen or at_once > 1:
      drawn = _advance(how, rows, drawn, jnp.int32(min(seen + at_once, len(keys))))
    count = int(drawn.count)
    yield np.asarray(drawn.tokens[:, seen:count])
    if bool(jnp.all(drawn.stopped)):
      return
    seen = count


class _How(NamedTuple):
  """What the compiled programs depend on; see `generate_tokens`."""

  model: nn.Module
  sampling: Sampling
  stop: tuple[int, ...]


def _rows(variables, prompts, keys, allowed, room: int = 1) -> tuple[_Rows, Int[np.ndarray, "B P"]]:
  """Returns the rows to continue, and their prompts with padding before them.

  The length P is a power of two, so that few programs are compiled for prompts of many lengths.
  """
  if not all(map(len, prompts)):
    raise ValueError("a prompt is empty: start it with the tokenizer's boundary token")
  if allowed is not None and not np.any(allowed):
    raise ValueError("allowed names no token")
  longest = 1 << (max(room, *map(len, prompts)) - 1).bit_length()
  tokens = np.zeros((len(prompts), longest), np.int32)
  # The last token that is drawn is never read.
  segment_ids = np.ones((len(prompts), longest + len(keys) - 1), np.int32)
  for row, prompt in enumerate(prompts):
    tokens[row, longest - len(prompt) :] = prompt
    segment_ids[row, : longest - len(prompt)] = 0
  # Unlike an array on this process's device, raw numbers suit a mesh of several processes.
  key_data = np.asarray(jax.random.key_data(keys))
  return _Rows(variables, segment_ids, key_data, allowed), tokens


def _read(how: _How, rows: _Rows, cache, tokens: Int[Array, "B L"], index, **encoder):
  """Returns the logits after the last of L tokens that begin at place `index`, and the cache."""
  index = jnp.asarray(index, jnp.int32)
  length = tokens.shape[1]
  segment_ids = jax.lax.dynamic_slice_in_dim(rows.segment_ids, index, length, axis=1)
  padding = jnp.sum(rows.segment_ids == 0, axis=1, keepdims=True)
  positions = jnp.maximum(index + jnp.arange(length) - padding, 0).astype(jnp.int32)
  (logits, _), changed = how.model.apply(
    {**rows.variables, **cache},
    tokens,
    segment_ids,
    positions,
    train=False,
    cached=Cached(index, rows.segment_ids),
    mutable=["cache"],
    **encoder,
  )
  return logits[:, -1], changed


def _first(how: _How, rows: _Rows, prompts: Int[Array, "B P"], encoder) -> _Drawn:
  """Reads the prompts and draws the first token of each row."""
  others = {} if encoder is None else {"encoder": encoder}
  logits, cache = _read(how, rows, {}, prompts, 0, **others)
  blank = jnp.full((prompts.shape[0], rows.keys.shape[0]), -1, jnp.int32)
  empty = _Drawn(cache, blank, jnp.int32(0), jnp.zeros(prompts.shape[0], bool))
  return _add(how, rows, empty, logits, cache)


def _add(how: _How, rows: _Rows, drawn: _Drawn, logits, cache) -> _Drawn:
  """Draws a token of each row that has not stopped."""
  key = jax.random.wrap_key_data(rows.keys[drawn.count])
  token = draw(key, constrain(logits, None, None), how.sampling, rows.allowed)
  token = jnp.where(drawn.stopped, -1, token)
  is_stop = jnp.any(token[:, None] == jnp.asarray(how.stop, jnp.int32), axis=1)
  return _Drawn(
    cache,
    jax.lax.dynamic_update_slice_in_dim(drawn.tokens, token[:, None], drawn.count, axis=1),
    drawn.count + 1,
    drawn.stopped | is_stop,
  )


def _until(how: _How, rows: _Rows, drawn: _Drawn, until) -> _Drawn:
  """Draws tokens until each row has `until` of them, or all rows have stopped."""
  prompt_length = rows.segment_ids.shape[1] - rows.keys.shape[0] + 1

  def more(drawn):
    return (drawn.count < until) & ~jnp.all(drawn.stopped)

  def step(drawn):
    last = jax.lax.dynamic_slice_in_dim(drawn.tokens, drawn.count - 1, 1, axis=1)
    # Rows that have stopped read any token, and nobody reads what they make of it.
    logits, cache = _read(
      how, rows, drawn.cache, jnp.maximum(last, 0), prompt_length + drawn.count - 1
    )
    return _add(how, rows, drawn, logits, cache)

  return jax.lax.while_loop(more, step, drawn)


@functools.partial(jax.jit, static_argnums=0)
def _all_at_once(how: _How, rows: _Rows, prompts, encoder) -> Int[Array, "B n"]:
  drawn = _until(how, rows, _first(how, rows, prompts, encoder), rows.keys.shape[0])
  return constrain(drawn.tokens, None, None)


_start = jax.jit(_first, static_argnums=0)
_advance = jax.jit(_until, static_argnums=0, donate_argnums=2)
