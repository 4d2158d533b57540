"""The choice of the next token from the logits of a model."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are drawn: from softmax(logits / temperature), restricted to likely tokens.

  The filters are applied in the order of their fields, as in Hugging Face's transformers.

  Attributes:
    temperature: The divisor of the logits, >= 0. 0 takes the most likely token.
    top_k: Only the `top_k` most likely tokens may be drawn; 0 means all.
    top_p: Only the most likely tokens may be drawn whose probabilities together reach `top_p`, in
      (0, 1] (nucleus sampling, Holtzman et al. 2020, arXiv 1904.09751); 1 means all.

  Raises:
    ConfigError: A field is out of range.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    if not 0 <= self.temperature < float("inf"):
      raise ConfigError("temperature", self.temperature, "must be >= 0 and finite; 0 is greedy")
    if self.top_k < 0:
      raise ConfigError("top_k", self.top_k, "must be >= 0; 0 allows all tokens")
    if not 0 < self.top_p <= 1:
      raise ConfigError(
        "top_p", self.top_p, "must be above 0 and at most 1, which allows all tokens"
      )


def draw(
  key: Key[Array, ""],
  logits: Float[Array, "B V"],
  sampling: Sampling,
  allowed: Bool[Array, "W"] | None = None,
) -> Int[Array, "B"]:
  """Returns a token for each row; the same key gives the same tokens.

  Args:
    key: A typed PRNG key.
    logits: Logits of the next token.
    sampling: How tokens are drawn.
    allowed: For each of the first W <= V tokens whether it may be drawn; the others may not. None
      means that all tokens may.
  """
  logits = logits.astype(jnp.float32)
  if allowed is not None:
    logits = jnp.where(allowed, logits[:, : allowed.shape[0]], -jnp.inf)
  if sampling.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits / sampling.temperature
  if 0 < sampling.top_k < logits.shape[-1]:
    least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if sampling.top_p < 1:
    logits = jnp.where(_in_nucleus(logits, sampling.top_p), logits, -jnp.inf)
  # The argmax of logits plus Gumbel noise is a sample of their softmax.
  return jnp.argmax(logits + jax.random.gumbel(key, logits.shape), axis=-1).astype(jnp.int32)


def _in_nucleus(logits: Float[Array, "B V"], top_p: float) -> Bool[Array, "B V"]:
  """Returns whether each token is among the most likely ones that together reach `top_p`."""
  order = jnp.argsort(-logits, axis=-1)
  probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
  # A token belongs to the nucleus if the tokens before it do not reach `top_p`, so that the most
  # likely one always does.
  before = jnp.cumsum(probabilities, axis=-1) - probabilities
  rank = jnp.argsort(order, axis=-1)
  return jnp.take_along_axis(before < top_p, rank, axis=-1)
