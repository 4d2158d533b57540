"""Pipeline `windows`: the windows of sources that were tokenised beforehand are shuffled globally.

Each source is tokenised once into a flat file in the cache.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
from absl import logging

from moe_jax.data import cache, states
from moe_jax.data.documents import Subset
from moe_jax.data.mixture import Stretch, local_rows, mix, next_stretch, weights
from moe_jax.data.options import DataOptions
from moe_jax.data.rows import Rows, batch
from moe_jax.data.sources import Source
from moe_jax.data.span_corruption import span_corruption
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.errors import ConfigError

_FORMAT = 2  # Increase this when the content of a flat file changes.


def flat_tokens(data: DataOptions, tokenizer: Tokenizer, source: Source, split: str) -> np.ndarray:
  """Returns the tokens of a split of a source, memory-mapped from the cache.

  The tokens are: boundary, tokens of document 0, boundary, tokens of document 1, ..., boundary. If
  the tokenizer has an `eos`, the tokens of each document end with it.

  Args:
    data: The options of the data.
    tokenizer: The tokenizer.
    source: The source.
    split: "train" or "validation".

  Returns:
    [N] uint16 if the ids of the tokenizer fit, and uint32 otherwise.

  Raises:
    ConfigError: If the cache cannot be read or written, or if a document cannot be read or encoded.
  """
  dtype = np.dtype("<u2" if tokenizer.size <= 2**16 else "<u4")
  documents = source.documents(split)
  parts = (
    _FORMAT,
    source.name,
    source.fingerprint,
    split,
    data.validation_fraction,
    data.validation_split,
    data.text_field,
    tokenizer.fingerprint,
    tokenizer.boundary,
    tokenizer.size,
    dtype.str,
  )
  path = cache.cache_dir(data.cache_dir) / f"tokens-{cache.key(*parts)}.{dtype.str[1:]}"

  # A file with the right digest may still contain ids that the embedding has no row for, if the
  # library that wrote them was faulty.
  def good(content):
    return (
      content.size > 0
      and content.size % dtype.itemsize == 0
      and (content.view(dtype).max() < tokenizer.size)
    )

  cache.built(
    path,
    functools.partial(_tokenise, tokenizer, documents, dtype, f"{source.name} ({split})"),
    good,
  )
  return cache.content(path).view(dtype)


def _tokenise(
  tokenizer: Tokenizer, documents: Subset, dtype: np.dtype, name: str, file: BinaryIO
) -> None:
  """Writes the flat file of a split into `file`; `name` is that of the split in the log."""
  logging.info("tokenising %s: %d documents (once)", name, len(documents))
  for text in documents:
    file.write(tokenizer.document(text).astype(dtype).tobytes())
  file.write(np.array([tokenizer.boundary], dtype).tobytes())


class Windows:
  """Flat tokens as a sequence of windows; the i-th one is `flat[i*L : (i+1)*L + 1]`.

  Successive windows share one token, so that each token but the first is a target exactly once.
  Tokens at the end that do not fill a window are left out.

  Args:
    flat: [N] The tokens.
    seq_len: The number L of targets of a window.
  """

  def __init__(self, flat: np.ndarray, seq_len: int):
    self._flat, self._seq_len = flat, seq_len
    self._unchanged = None
    if isinstance(flat, np.memmap) and flat.filename is not None:
      self._unchanged = cache.Unchanged(flat.filename)

  def __len__(self) -> int:
    return (len(self._flat) - 1) // self._seq_len

  def __getitem__(self, i: int) -> np.ndarray:
    if self._unchanged:
      self._unchanged.check()
    start = int(i) * self._seq_len
    return np.asarray(self._flat[start : start + self._seq_len + 1])


class TrainWindows:
  """An endless iterator over batches of shuffled windows.

  The state is the number of batches that were returned. If the shares of the sources were changed,
  it is also the stretch of the data with the present shares.

  Args:
    data: The options of the data.
    tokenizer: The tokenizer of all sources.
    sources: The sources of the mixture.
    rows: The rows of the global batch that this process reads.
    seq_len: Number of tokens of a row.

  Raises:
    ConfigError: If a source has less text than one window, or if the weights do not fit the
      sources.
  """

  def __init__(
    self,
    data: DataOptions,
    tokenizer: Tokenizer,
    sources: Sequence[Source],
    rows: Rows,
    seq_len: int,
  ):
    self._corruption = span_corruption(data, tokenizer.size, tokenizer.boundary, seq_len)
    length = self._corruption.raw if self._corruption else seq_len
    records = [Windows(flat_tokens(data, tokenizer, source, "train"), length) for source in sources]
    shares = weights(data.weights, sources, [max(1, len(r)) for r in records])
    for source, record, share in zip(sources, records, shares, strict=True):
      if share > 0:
        _check_window(
          source,
          record,
          f"{length} tokens" if self._corruption else f"data.seq_len={length} tokens",
        )
    self._records, self._sources, self._seed = records, list(sources), data.seed
    self._first = self._stretch = Stretch(tuple(shares), 0, (0,) * len(shares))
    self._rows, self._threads, self._boundary = rows, data.threads, tokenizer.boundary
    self._batches, self._iterator = 0, None

  def __iter__(self):
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    if self._iterator is None:
      self._iterator = self._start()
    out = next(self._iterator)
    self._batches += 1
    return out

  def _start(self):
    """Returns an iterator that starts after the batches that were returned already."""
    import grain

    stretch, corruption = self._stretch, self._corruption
    dataset = mix(self._records, stretch.shares, self._sources, self._seed, stretch.read)
    if corruption:
      # The spans depend on the index in the endless sequence of all rows, so that each epoch masks
      # other spans.
      before = stretch.start * self._rows.batch_size
      dataset = dataset.map_with_index(
        lambda i, tokens: corruption.example(tokens[:-1], "train", before + i)
      )
    batches = local_rows(dataset, self._rows, self._batches - stretch.start).batch(
      self._rows.size, drop_remainder=True
    )
    if not corruption:
      batches = batches.map(functools.partial(batch, boundary=self._boundary))
    ahead = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=4 * self._threads)
    return iter(batches.to_iter_dataset(ahead))

  def get_state(self) -> dict[str, Any]:
    """Returns the state, which is the same on every process."""
    state = {"pipeline": "windows", "batches": self._batches}
    if self._stretch != self._first:
      fields = dataclasses.asdict(self._stretch)
      state["stretch"] = {
        name: list(x) if isinstance(x, tuple) else x for name, x in fields.items()
      }
    return state

  def set_state(self, state: Any) -> None:
    """Continues from a state that `get_state` returned.

    Raises:
      ConfigError: If `state` is not valid, or if it is one of another pipeline.
    """
    batches = states.windows(state)
    stretch = states.stretch(state, len(self._sources)) or self._first
    self.close()
    self._batches, self._stretch = batches, stretch

  @property
  def shares(self) -> list[float]:
    """The share of each source in the next batch."""
    return list(self._stretch.shares)

  def change_shares(self, shares: Sequence[float]) -> None:
    """Gives the sources other shares from the next batch on.

    Each source goes on with its next record. All processes must call this after the same batch and
    with the same shares.

    Args:
      shares: The share of each source, above 0 for the same sources as before.
    """
    self.close()
    self._stretch = next_stretch(self._stretch, shares, self._batches, self._rows.batch_size)

  def take_shares(self, state: Any) -> None:
    """Gives the sources the shares of a state, and goes on with the next batch.

    Args:
      state: What `get_state` returned, or {} for the shares of the first batch.
    """
    saved = states.stretch(state, len(self._sources)) if state else None
    self.change_shares((saved or self._first).shares)

  def close(self) -> None:
    """Stops reading ahead; the next batch starts a new iterator."""
    if self._iterator is not None:
      self._iterator.close()
    self._iterator = None


def _check_window(source: Source, record: Windows, window: str) -> None:
  """Raises ConfigError if a source has no whole window; `window` is the length in words."""
  if not len(record):
    raise ConfigError(
      "data.sources",
      source.name,
      f"its training documents are shorter than one window of {window}; "
      "add text or lower data.seq_len",
    )


def validation_windows(
  data: DataOptions,
  tokenizer: Tokenizer,
  source: Source,
  rows: Rows,
  seq_len: int,
  num_batches: int,
) -> Iterator[dict[str, np.ndarray]]:
  """Yields batches of windows of the validation split; see `moe_jax.data.validation_batches`."""
  flat = flat_tokens(data, tokenizer, source, "validation")
  corruption = span_corruption(data, tokenizer.size, tokenizer.boundary, seq_len)
  length = corruption.raw if corruption else seq_len
  # The last window may be shorter than the others, hence the division that rounds up.
  windows = -(-(len(flat) - 1) // length)
  chosen = np.arange(windows)
  if 0 < num_batches * rows.batch_size < windows:
    num_chosen = num_batches * rows.batch_size
    chosen = np.arange(num_chosen) * windows // num_chosen
  for start in range(0, len(chosen), rows.batch_size):
    local_windows = chosen[start + rows.first : start + rows.first + rows.size]
    pieces = [flat[window * length : (window + 1) * length + 1] for window in local_windows]
    # Empty pieces become rows of padding, so that all batches have the same shape.
    pieces += [flat[:0]] * (rows.size - len(pieces))
    if corruption:
      examples = [
        corruption.example(piece[:-1], "validation", window)
        for piece, window in itertools.zip_longest(pieces, local_windows)
      ]
      yield {name: np.stack([example[name] for example in examples]) for name in examples[0]}
    else:
      yield _next_token(pieces, seq_len, tokenizer.boundary)


def _next_token(pieces: Sequence[np.ndarray], seq_len: int, boundary: int) -> dict[str, np.ndarray]:
  """Pads stretches of at most `seq_len` + 1 tokens and returns them as a batch."""
  tokens, valid = np.zeros((len(pieces), seq_len + 1), np.int32), np.zeros(len(pieces), np.int32)
  for row, piece in enumerate(pieces):
    tokens[row, : len(piece)], valid[row] = piece, max(len(piece) - 1, 0)
  return batch(tokens, boundary, valid)
