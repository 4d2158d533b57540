"""Span corruption: spans of a text are masked, and the model learns to restore them.

This is the objective of T5 (arXiv 1910.10683, Sec. 3.1.4):

    text      Thank you for inviting me to your party last week
    inputs    Thank you <X> me to your party <Y> week
    targets   <X> for inviting <Y> last <Z>

Each masked span is replaced by one sentinel, a different one for each span. The targets are the
spans, each after its sentinel, and one more sentinel that ends them (Fig. 2). The ids of the
sentinels are above those of the tokenizer, and the first span has the highest id. T5 does the same:
its vocabulary has 32,000 pieces and 100 sentinels, which are used from 32,099 downwards.

Deviation: T5's code ends inputs and targets with an end-of-sequence id instead, and begins the
decoder's inputs with the padding id. Here, no id ends the inputs, and the decoder's inputs begin
with the tokenizer's boundary.

A window of text is one segment, and boundaries in it are tokens like any other. So, as in T5, the
ends of documents are ignored.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Integer

from moe_jax.data import cache
from moe_jax.data.options import DataOptions
from moe_jax.errors import ConfigError

SENTINELS = 100  # The smallest number of sentinels, which is that of T5.


class Lengths(NamedTuple):
  """The lengths that follow from the number of tokens that are corrupted; they are not random.

  Attributes:
    masked: Number of masked tokens.
    spans: Number of masked spans.
    inputs: Number of inputs: the tokens that are not masked, and a sentinel for each span.
    targets: Number of targets: the masked tokens, a sentinel for each span, and the last sentinel.
  """

  masked: int
  spans: int
  inputs: int
  targets: int


def lengths(tokens: int, density: float, mean_length: float) -> Lengths:
  """Returns the lengths that corrupting `tokens` tokens leads to.

  At least one token is masked, but not all. Before each span there is at least one token that is
  not masked.

  Args:
    tokens: Number of tokens, at least 2.
    density: Share of the tokens that are masked, up to rounding.
    mean_length: Mean number of tokens of a span, up to rounding.
  """
  masked = min(max(round(tokens * density), 1), tokens - 1)
  spans = min(max(round(masked / mean_length), 1), masked, tokens - masked)
  return Lengths(masked, spans, tokens - masked + spans, masked + spans + 1)


def raw_length(encoder_len: int, target_len: int, density: float, mean_length: float) -> int:
  """Returns the largest number of tokens whose inputs and targets fit into a row.

  This is T5's `random_spans_helper`.

  Args:
    encoder_len: The largest number of inputs.
    target_len: The largest number of targets.
    density: See `lengths`.
    mean_length: See `lengths`.

  Raises:
    ConfigError: If not even two tokens fit.
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
  # Neither length decreases with the number of tokens, so the last number that fits can be found by
  # bisection.
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
  """Masks random spans of a text, as in the example at the top of this module.

  Args:
    ids: [n] The text, at least two tokens. The first token is never masked, and the last one always
      is.
    rng: The generator that chooses the spans. All ways to cut the masked tokens into the given
      number of spans are equally likely, and so are all ways to cut the other tokens.
    density: Share of the tokens that are masked, above 0 and below 1.
    mean_length: Mean number of tokens of a span, at least 1.
    sentinel_ids: The ids of the sentinels, at least one more than there are spans.

  Returns:
    `(inputs, targets)`, whose lengths are those that `lengths` returns.
  """
  masked, spans, _, _ = lengths(len(ids), density, mean_length)
  # The lengths of kept and masked stretches alternate, beginning with a kept one.
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
  """Returns the text from which `corrupt` made `inputs` and `targets`."""
  starts = np.flatnonzero(np.isin(targets, sentinel_ids))
  spans = {targets[a]: targets[a + 1 : b] for a, b in zip(starts[:-1], starts[1:], strict=True)}
  return np.concatenate([spans.get(token, [token]) for token in inputs]).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class SpanCorruption:
  """Turns windows of `raw` tokens into rows for an encoder-decoder.

  Attributes:
    density: Share of the tokens that are masked, above 0 and below 1.
    mean_span: Mean number of tokens of a span, at least 1.
    encoder_len: Length of a row of encoder inputs.
    target_len: Length of a row of targets.
    first_sentinel: The lowest id of a sentinel, which is the size of the tokenizer.
    boundary: The id that is the first input of the decoder.
    seed: The seed from which the spans are drawn.
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
    """The number of tokens of a window of text, which is the most that a row can hold."""
    return raw_length(self.encoder_len, self.target_len, self.density, self.mean_span)

  @functools.cached_property
  def sentinels(self) -> Int32[np.ndarray, " s"]:
    """The ids of the sentinels in descending order.

    There are at least as many as in T5, and more if a window has more spans.
    """
    count = max(SENTINELS, lengths(self.raw, self.density, self.mean_span).spans + 1)
    return self.first_sentinel + np.arange(count - 1, -1, -1, dtype=np.int32)

  def example(
    self, ids: Integer[np.ndarray, " n"], *key: object
  ) -> dict[str, Int32[np.ndarray, " l"]]:
    """Returns a row whose segment 0 is padding.

    Args:
      ids: [n] At most `raw` tokens. Fewer than two tokens cannot be corrupted and give a row of
        padding.
      *key: The name of the row. Equal tokens with the same key and seed are always masked in the
        same way.

    Returns:
      `encoder_tokens`, `encoder_segment_ids` and `encoder_positions` are [encoder_len]. `inputs`,
      `targets`, `segment_ids` and `positions` are [target_len]. The `inputs` are the boundary
      followed by all targets but the last.
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
  data: DataOptions, tokenizer_size: int, boundary: int, seq_len: int | None = None
) -> SpanCorruption | None:
  """Returns the span corruption that `data` asks for.

  Args:
    data: The options of the data.
    tokenizer_size: The size of the tokenizer, above which the ids of the sentinels are.
    boundary: The id that starts a document.
    seq_len: The number of targets of a row. None means `data.seq_len`.

  Returns:
    None if `data.objective` is another one.
  """
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
  """Cuts `tokens` tokens at random into `parts` parts and returns their lengths (at least 1)."""
  cuts = np.sort(rng.choice(tokens - 1, parts - 1, replace=False)) + 1
  return np.diff(cuts, prepend=0, append=tokens)


def _pad(values: np.ndarray, length: int) -> Int32[np.ndarray, " length"]:
  """Appends zeros to `values` up to `length`."""
  return np.pad(values, (0, length - len(values))).astype(np.int32)
