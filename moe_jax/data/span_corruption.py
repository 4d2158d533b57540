"""Span corruption: spans of a text are masked, and a model restores them (T5, arXiv 1910.10683,
Sec. 3.1.4).

    text      Thank you for inviting me to your party last week
    inputs    Thank you <X> me to your party <Y> week
    targets   <X> for inviting <Y> last <Z>

Each masked span becomes one sentinel, a different one each time; the targets are the spans, each
behind its sentinel, and one sentinel more, which ends them (Fig. 2). Sentinels are ids above the
tokenizer's, the first span's the last of them all, as in T5's vocabulary of 32,000 pieces and 100
sentinels, 32,099 downwards.

Deviation: T5's code ends inputs and targets with an end-of-sequence id instead, and begins the
decoder's inputs with the id of padding; here no id ends the inputs, and the decoder's begin with
the tokenizer's boundary.

A window of text is one segment, and boundaries in it are tokens like others: like T5, it ignores
where documents end.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Integer

from moe_jax.data import cache
from moe_jax.errors import ConfigError

SENTINELS = 100  # at least


class Lengths(NamedTuple):
  """What corrupting some tokens makes of them: always the same numbers."""

  masked: int
  spans: int
  inputs: int
  targets: int


def lengths(tokens: int, density: float, mean_length: float) -> Lengths:
  """Of `tokens` (at least 2) tokens, about `density` are masked, at least one and not all, in spans
  with one or more unmasked tokens before each.
  """
  masked = min(max(round(tokens * density), 1), tokens - 1)
  spans = min(max(round(masked / mean_length), 1), masked, tokens - masked)
  return Lengths(masked, spans, tokens - masked + spans, masked + spans + 1)


def raw_length(encoder_len: int, target_len: int, density: float, mean_length: float) -> int:
  """The most tokens that become at most `encoder_len` inputs and `target_len` targets (T5's
  `random_spans_helper`).

  Raises:
    ConfigError: not even two tokens fit.
  """

  def fits(n):
    return (
      made := lengths(n, density, mean_length)
    ).inputs <= encoder_len and made.targets <= target_len

  if not fits(2):
    field, length, least = (
      ("encoder_len", encoder_len, 2) if encoder_len < 2 else ("seq_len", target_len, 3)
    )
    raise ConfigError(f"data.{field}", length, f"must be at least {least} for span_corruption")
  too_many = 4
  while fits(too_many):
    too_many *= 2
  # Neither length ever falls when there is a token more, so that the last number that fits can be
  # bisected.
  return (
    bisect.bisect_left(range(too_many + 1), True, lo=3, key=lambda tokens: not fits(tokens)) - 1
  )


def corrupt(
  ids: Integer[np.ndarray, " n"],
  rng: np.random.Generator,
  density: float,
  mean_length: float,
  sentinel_ids: Integer[np.ndarray, " s"],
) -> tuple[Int32[np.ndarray, " i"], Int32[np.ndarray, " t"]]:
  """`(inputs, targets)` of two or more tokens, as in the example above; their lengths are those of
  `lengths`.

  Args:
    ids: the text; the first token is never masked, the last one always is.
    rng: where the spans come from: all cuts into so many spans, and so many stretches between them,
      are as likely.
    density: share of the tokens that are masked, above 0 and below 1.
    mean_length: tokens of a span, on average; at least 1.
    sentinel_ids: one more than spans.
  """
  masked, spans, _, _ = lengths(len(ids), density, mean_length)
  stretches = np.stack(
    [_cut(len(ids) - masked, spans, rng), _cut(masked, spans, rng)], axis=1
  ).ravel()
  pieces = np.split(np.asarray(ids, np.int32), np.cumsum(stretches)[:-1])
  marks = np.asarray(sentinel_ids, np.int32)[: spans + 1, None]
  inputs = [part for i in range(spans) for part in (pieces[2 * i], marks[i])]
  targets = [part for i in range(spans) for part in (marks[i], pieces[2 * i + 1])]
  return np.concatenate(inputs), np.concatenate([*targets, marks[spans]])


def restore(
  inputs: Integer[np.ndarray, " i"],
  targets: Integer[np.ndarray, " t"],
  sentinel_ids: Integer[np.ndarray, " s"],
) -> Int32[np.ndarray, " n"]:
  """The text of which `corrupt` made `inputs` and `targets`."""
  starts = np.flatnonzero(np.isin(targets, sentinel_ids))
  spans = {targets[a]: targets[a + 1 : b] for a, b in zip(starts[:-1], starts[1:], strict=True)}
  return np.concatenate([spans.get(token, [token]) for token in inputs]).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class SpanCorruption:
  """Makes rows for an encoder-decoder of windows of `raw` tokens.

  Attributes:
    density: see `corrupt`, as for the next.
    mean_span: tokens.
    encoder_len: of a row of inputs.
    target_len: of a row of targets.
    first_sentinel: the lowest one; the tokenizer's size.
    boundary: the decoder's first input.
    seed: of the spans.
  """

  density: float
  mean_span: float
  encoder_len: int
  target_len: int
  first_sentinel: int
  boundary: int
  seed: int

  @functools.cached_property
  def raw(self) -> int:
    """Tokens of a window of text, all of which a row holds."""
    return raw_length(self.encoder_len, self.target_len, self.density, self.mean_span)

  @functools.cached_property
  def sentinels(self) -> Int32[np.ndarray, " s"]:
    """Their ids, downwards; T5's number of them, or more where a window has more spans."""
    count = max(SENTINELS, lengths(self.raw, self.density, self.mean_span).spans + 1)
    return self.first_sentinel + np.arange(count - 1, -1, -1, dtype=np.int32)

  def example(
    self, ids: Integer[np.ndarray, " n"], *key: object
  ) -> dict[str, Int32[np.ndarray, " l"]]:
    """A row: encoder_tokens, encoder_segment_ids and encoder_positions [encoder_len]; inputs (the
    targets shifted right by one, behind the boundary), targets, segment_ids and positions
    [target_len]. Segment 0 is padding.

    Args:
      ids: at most `raw` tokens; fewer than two cannot be corrupted and give a row of padding.
      *key: names the row; the same tokens with the same key and seed are always masked alike.
    """
    inputs = targets = np.zeros(0, np.int32)
    if len(ids) >= 2:
      rng = np.random.default_rng(int(cache.key("span_corruption", self.seed, *key), 16))
      inputs, targets = corrupt(ids, rng, self.density, self.mean_span, self.sentinels)
    shifted = np.concatenate([[self.boundary], targets])[: len(targets)]
    row = {
      "encoder_tokens": _pad(inputs, self.encoder_len),
      "inputs": _pad(shifted, self.target_len),
      "targets": _pad(targets, self.target_len),
    }
    for prefix, length, full in (
      ("encoder_", len(inputs), self.encoder_len),
      ("", len(targets), self.target_len),
    ):
      row[f"{prefix}segment_ids"] = _pad(np.ones(length), full)
      row[f"{prefix}positions"] = _pad(np.arange(length), full)
    return row


def span_corruption(
  data, tokenizer_size: int, boundary: int, seq_len: int | None = None
) -> SpanCorruption | None:
  """What `data` (config.data) says of it; None if the objective is another."""
  if data.objective != "span_corruption":
    return None
  return SpanCorruption(
    data.noise_density,
    data.mean_span,
    data.encoder_len,
    seq_len or data.seq_len,
    tokenizer_size,
    boundary,
    data.seed,
  )


def _cut(tokens: int, parts: int, rng: np.random.Generator) -> Integer[np.ndarray, " p"]:
  """Lengths, each at least 1, of `parts` parts of `tokens` tokens."""
  cuts = np.sort(rng.choice(tokens - 1, parts - 1, replace=False)) + 1
  return np.diff(cuts, prepend=0, append=tokens)


def _pad(values: np.ndarray, length: int) -> Int32[np.ndarray, " length"]:
  return np.pad(values, (0, length - len(values))).astype(np.int32)
