"""Text that a trained model writes after a prompt."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from moe_jax.errors import ConfigError
from moe_jax.generation import Sampling, generate_tokens, stream_tokens
from moe_jax.run.load import LoadedRun
from moe_jax.run.text_model import TextModel, source_rows, text_model

# How many tokens are drawn between two looks for a text to stop at.
_AT_ONCE = 16


def generate(
  run: str | os.PathLike | LoadedRun | TextModel,
  prompts: str | Sequence[str],
  *,
  max_tokens: int = 128,
  temperature: float = 0.0,
  top_k: int = 0,
  top_p: float = 1.0,
  seed: int = 0,
  stop: Sequence[str] = (),
  step: int | None = None,
  mesh: Mapping[str, int] | None = None,
  on_text: Callable[[int, str], None] | None = None,
) -> str | list[str]:
  """Returns what a trained model writes after each prompt.

  A text ends at the end of a document, at a text of `stop`, or after `max_tokens` tokens. A prompt
  is the beginning of a document. An encoder-decoder reads the prompt with its encoder instead; it
  has learned to fill gaps, which are written <extra_id_0>, <extra_id_1> and so on.

  Each token is routed by itself, and no expert runs out of slots, whatever the capacity factor of
  training is. Positions may exceed those of training, `data.seq_len`; no position is left out.

  Args:
    run: The --workdir of a run, what `load_run` returned, or what `text_model` returned, which
      saves loading the run again.
    prompts: One prompt, or several, which are continued together.
    max_tokens: The largest number of tokens of each text, >= 1.
    temperature: See `Sampling`, also for `top_k` and `top_p`.
    top_k: The number of most likely tokens that may be drawn; 0 means all.
    top_p: The probability that the tokens which may be drawn reach together.
    seed: The seed of the random numbers.
    stop: Texts at which a text ends. They are not part of it.
    step: The step of the checkpoint. None means the newest one.
    mesh: The size of each axis of the mesh that is not 1. None means one device.
    on_text: Called with the number of a prompt and a piece of its text as soon as the piece is
      written. The pieces of a text together are the text.

  Returns:
    The text of one prompt, or a list with that of each prompt.

  Raises:
    ConfigError: An option is out of range, there is no prompt, or `text_model` refuses the run.
  """
  sampling = Sampling(temperature, top_k, top_p)
  texts = [prompts] if isinstance(prompts, str) else list(prompts)
  if not texts:
    raise ConfigError("prompts", texts, "must hold at least one prompt")
  if max_tokens < 1:
    raise ConfigError("max_tokens", max_tokens, "must be at least 1")
  if not all(stop):
    raise ConfigError("stop", tuple(stop), "must not hold an empty text, which is everywhere")
  text = text_model(run, step, mesh)
  ids = [text.encode(prompt) for prompt in texts]
  boundary = text.tokenizer.boundary
  starts = [[boundary]] * len(ids) if text.has_encoder else [[boundary, *row] for row in ids]
  arguments: dict[str, Any] = dict(
    stop=text.boundaries,
    allowed=text.allowed,
    encoder=source_rows(ids) if text.has_encoder else None,
  )
  keys = jax.random.split(jax.random.key(seed), max_tokens)
  written = [_Text(text.decode, text.boundaries, stop) for _ in texts]
  with text.placed():
    # Only tokens that somebody waits for are worth the way out of the compiled program.
    if on_text or stop:
      at_once = 1 if on_text else _AT_ONCE
      pieces = stream_tokens(
        text.model, text.variables, starts, keys, sampling, at_once=at_once, **arguments
      )
    else:
      pieces = [generate_tokens(text.model, text.variables, starts, keys, sampling, **arguments)]
    for piece in pieces:
      for row, tokens in zip(written, piece, strict=True):
        row.add(tokens)
      _report(written, on_text)
      if all(row.is_complete for row in written):
        break
  for row in written:
    row.is_complete = True
  _report(written, on_text)
  results = [row.shown for row in written]
  return results[0] if isinstance(prompts, str) else results


def _report(written: Sequence[_Text], on_text: Callable[[int, str], None] | None) -> None:
  """Calls `on_text` with what each text has grown by."""
  for number, row in enumerate(written):
    new = row.grow()
    if new and on_text is not None:
      on_text(number, new)


class _Text:
  """A text that grows by tokens, up to a boundary or to a text to stop at.

  Attributes:
    shown: The part of the text that cannot change any more.
    is_complete: Whether the text has ended.
  """

  def __init__(
    self, decode: Callable[[list[int]], bytes], boundaries: Sequence[int], stop: Sequence[str]
  ):
    self.shown, self.is_complete = "", False
    self._decode, self._boundaries, self._stop, self._ids = decode, boundaries, stop, []

  def add(self, tokens: np.ndarray) -> None:
    """Adds tokens, of which -1 and boundaries stand for no text."""
    for token in tokens.tolist():
      if not self.is_complete:
        self.is_complete = token < 0 or token in self._boundaries
        self._ids += [] if self.is_complete else [token]

  def grow(self) -> str:
    """Makes as much of the text final as is certain, and returns the new part."""
    content = self._decode(self._ids)
    # The first bytes of a character wait for its other bytes.
    text = content.decode("utf-8", "replace")
    whole = text if self.is_complete else text.rstrip("\ufffd")
    ends = [whole.find(stop) for stop in self._stop if stop in whole]
    if ends:
      whole, self.is_complete = whole[: min(ends)], True
    elif not self.is_complete and self._stop:
      # What may be the beginning of a text to stop at waits, too.
      whole = whole[: len(whole) - max(_overlap(whole, stop) for stop in self._stop)]
    new, self.shown = whole[len(self.shown) :], max(self.shown, whole, key=len)
    return new


def _overlap(text: str, stop: str) -> int:
  """Returns the length of the longest end of `text` with which `stop` begins."""
  return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))
