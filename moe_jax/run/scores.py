"""The log-likelihoods of texts under a trained model."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from moe_jax.errors import ConfigError
from moe_jax.models.output import token_nats
from moe_jax.run.text_model import TextModel


class _Row(NamedTuple):
  """Tokens, of which the last ones are scored.

  Attributes:
    text: The number of the text that the row is a part of.
    tokens: The tokens, at least two.
    scored: The number of last tokens that are scored, below the number of tokens.
  """

  text: int
  tokens: list[int]
  scored: int


def continuations(
  text: TextModel, pairs: Sequence[tuple[str, str]], batch_size: int = 8
) -> list[tuple[float, bool]]:
  """Returns log p(continuation | context) of each pair, and whether greedy decoding gives it.

  The context is the beginning of a document; it may be empty. As in lm-evaluation-harness, spaces
  at the end of a context belong to the continuation, and both are tokenised together, so that a
  token never lies across their border. Of longer texts only the last `data.seq_len` + 1 tokens are
  read. Tokens are routed by themselves, and nothing is dropped (`LayerContext.dropless`).

  Args:
    text: The model.
    pairs: The context and the continuation, which is not empty.
    batch_size: The number of rows that are read at once. It changes no result.

  Raises:
    ConfigError: The model has an encoder, or a continuation is empty.
  """
  rows = []
  for number, (context, continuation) in enumerate(pairs):
    if not continuation:
      raise ConfigError("continuation", continuation, "is empty; there is nothing to score")
    stripped = context.rstrip()
    ids = text.encode(context + continuation)
    given = len(text.encode(stripped))
    scored = max(len(ids) - given, 1)
    tokens = [text.tokenizer.boundary, *ids][-(_longest(text) + 1) :]
    rows.append(_Row(number, tokens, min(scored, len(tokens) - 1)))
  scores = [(0.0, True)] * len(pairs)
  for row, nats, is_greedy in _score(text, rows, batch_size):
    scores[row.text] = (-nats, is_greedy)
  return scores


def documents(text: TextModel, texts: Sequence[str], batch_size: int = 8) -> list[float]:
  """Returns log p of each text as a document, whose end is not scored.

  The document is cut into rows of `data.seq_len` tokens, as in the evaluation of a training run.
  Each token is scored once. Routing is that of `continuations`.

  Args:
    text: The model.
    texts: The texts.
    batch_size: The number of rows that are read at once. It changes no result.

  Raises:
    ConfigError: The model has an encoder.
  """
  rows, length = [], _longest(text)
  for number, document in enumerate(texts):
    tokens = [text.tokenizer.boundary, *text.encode(document)]
    for start in range(0, len(tokens) - 1, length):
      piece = tokens[start : start + length + 1]
      rows.append(_Row(number, piece, len(piece) - 1))
  scores = [0.0] * len(texts)
  for row, nats, _ in _score(text, rows, batch_size):
    scores[row.text] -= nats
  return scores


def _longest(text: TextModel) -> int:
  """Returns the largest number of tokens that a row reads."""
  if text.has_encoder:
    raise ConfigError(
      "model.family",
      text.config.data.objective,
      "scores of texts need a model of the next token; use a run with data.objective='next_token'",
    )
  return text.config.data.seq_len


def _score(
  text: TextModel, rows: Sequence[_Row], batch_size: int
) -> Iterator[tuple[_Row, float, bool]]:
  """Yields each row, its nats and whether its scored tokens are the most likely ones.

  Rows of similar lengths are read together.
  """
  ordered = sorted(rows, key=lambda row: len(row.tokens), reverse=True)
  with text.placed():
    for start in range(0, len(ordered), batch_size):
      batch = ordered[start : start + batch_size]
      # Few lengths mean few compiled programs.
      length = 1 << (len(batch[0].tokens) - 2).bit_length()
      tokens, valid, scored = np.zeros((3, batch_size, length + 1), np.int32)
      for i, row in enumerate(batch):
        n = len(row.tokens)
        tokens[i, :n], valid[i, : n - 1], scored[i, n - row.scored : n] = row.tokens, 1, 1
      nats, is_greedy = _nats(
        text.model,
        text.variables,
        tokens[:, :-1],
        tokens[:, 1:],
        valid[:, :-1],
        scored[:, 1:].astype(bool),
      )
      nats, is_greedy = np.asarray(nats), np.asarray(is_greedy)
      for i, row in enumerate(batch):
        yield row, float(nats[i]), bool(is_greedy[i])


@functools.partial(jax.jit, static_argnums=0)
def _nats(
  model: nn.Module,
  variables,
  inputs: Int[Array, "B L"],
  targets: Int[Array, "B L"],
  segment_ids: Int[Array, "B L"],
  is_scored: Bool[Array, "B L"],
) -> tuple[Float[Array, "B"], Bool[Array, "B"]]:
  """Returns the nats of each row's scored targets, and whether all of them are the most likely."""
  positions = jnp.broadcast_to(jnp.arange(inputs.shape[1], dtype=jnp.int32), inputs.shape)
  logits, _ = model.apply(variables, inputs, segment_ids, positions, train=False, dropless=True)
  nats, _ = token_nats(logits, targets)
  is_most_likely = jnp.argmax(logits, axis=-1) == targets
  return jnp.sum(nats * is_scored, axis=-1), jnp.all(is_most_likely | ~is_scored, axis=-1)
