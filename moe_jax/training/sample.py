"""Autoregressive sampling, which draws each token from softmax(logits / temperature)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.sharding import constrain


def sample(
  model: nn.Module,
  variables: Mapping[str, Any],
  prompt: Sequence[int],
  num_tokens: int,
  key: Key[Array, ""],
  temperature: float,
  *,
  window: int,
  allowed: Bool[np.ndarray, "size"] | None = None,
  rows: int = 1,
) -> Int[np.ndarray, "rows num_tokens"]:
  """Draws continuations of `prompt`; the same key gives the same tokens.

  Args:
    model: The model, called as `model.apply(variables, tokens, segment_ids, positions,
      train=False) -> (logits, aux)`.
    variables: Parameters and router state, as `model.apply` takes them.
    prompt: At least one token. The model reads only the last `window` tokens of it.
    num_tokens: The number of tokens to draw.
    key: A typed PRNG key.
    temperature: The divisor of the logits. 0 takes the most likely token.
    window: The number of tokens of context. Older tokens are dropped.
    allowed: For each token whether it may be drawn; for example special tokens may not. Tokens
      beyond its end may not be drawn. None means that all tokens may.
    rows: The number of independent continuations, which are the batch that the model gets.

  Returns:
    The drawn tokens, without the prompt.

  Raises:
    ValueError: If the prompt is empty or no token is allowed.
  """
  if not len(prompt):
    raise ValueError("prompt is empty: start it with the tokenizer's boundary token")
  if allowed is not None and not np.any(allowed):
    raise ValueError("allowed names no token")
  context = Window.start(prompt, window, rows)
  drawn = []
  for step_key in jax.random.split(key, num_tokens):
    logits = next_logits(model, variables, context.tokens, context.length)
    drawn.append(draw(step_key, logits, temperature, allowed))
    context = context.append(drawn[-1])
  return np.stack(drawn, axis=1) if drawn else np.zeros((rows, 0), np.int32)


class Window:
  """The context as a window of fixed length, so that the model is compiled only once.

  A key-value cache would replace this class and `next_logits`, and nothing else.

  Attributes:
    tokens: The tokens of the context, [rows, window].
    length: How many tokens of each row are in use.
  """

  def __init__(self, tokens: Int[np.ndarray, "rows window"], length: int):
    self.tokens, self.length = tokens, length

  @classmethod
  def start(cls, prompt: Sequence[int], window: int, rows: int) -> Window:
    """Returns a window whose rows all hold the end of the prompt."""
    end = np.asarray(prompt, np.int32)[-window:]
    tokens = np.zeros((rows, window), np.int32)
    tokens[:, : len(end)] = end
    return cls(tokens, len(end))

  def append(self, token: Int[np.ndarray, "rows"]) -> Window:
    """Returns the window with one more token per row; a full window drops its oldest tokens."""
    full = self.length == self.tokens.shape[1]
    tokens = np.roll(self.tokens, -1, axis=1) if full else self.tokens.copy()
    length = self.length if full else self.length + 1
    tokens[:, length - 1] = token
    return Window(tokens, length)


@functools.partial(jax.jit, static_argnums=0)
def next_logits(
  model: nn.Module,
  variables: Mapping[str, Any],
  tokens: Int[Array, "rows window"],
  length: Int[Array, ""],
) -> Float[Array, "rows V"]:
  """Returns the logits of the token that follows the first `length` tokens.

  The rest of the window is padding, which takes no slots of experts.
  """
  index = jnp.arange(tokens.shape[1], dtype=jnp.int32)
  valid = jnp.broadcast_to(index < length, tokens.shape)
  positions = jnp.broadcast_to(index, tokens.shape)
  logits, _ = model.apply(variables, tokens, valid.astype(jnp.int32), positions, train=False)
  return constrain(
    jax.lax.dynamic_index_in_dim(logits, length - 1, axis=1, keepdims=False), None, None
  )


def draw(key, logits, temperature: float, allowed=None) -> Int[np.ndarray, "rows"]:
  """Draws one token per row from softmax(logits / temperature), restricted to `allowed`."""
  logits = np.asarray(logits, np.float32)
  if allowed is not None:
    logits = np.where(allowed, logits[:, : len(allowed)], -np.inf)
  # The argmax of logits plus Gumbel noise is a sample of their softmax.
  if temperature > 0:
    logits = logits / temperature + np.asarray(jax.random.gumbel(key, logits.shape))
  return logits.argmax(-1).astype(np.int32)
