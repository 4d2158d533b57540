"""Pipeline `windows`: each source is tokenised once into a flat file; training shuffles its windows
globally."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
from absl import logging

from moe_jax.data import cache, states
from moe_jax.data.documents import Subset
from moe_jax.data.mixture import local_rows, mix, weights
from moe_jax.data.rows import Rows, batch
from moe_jax.data.sources import Source
from moe_jax.data.span_corruption import span_corruption
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.errors import ConfigError

_FORMAT = 2  # changes with what is in a flat file


def flat_tokens(data, tokenizer: Tokenizer, source: Source, split: str) -> np.ndarray:
  """boundary, tokens of document 0, boundary, tokens of document 1, ..., boundary: memory-mapped
  from the cache.

  Each document's tokens end with the tokenizer's `eos` where it has one.
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

  # What has the right digest may still hold ids that the embedding has no row for, where a library
  # broke its promise.
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
  logging.info("tokenising %s: %d documents (once)", name, len(documents))
  for text in documents:
    file.write(tokenizer.document(text).astype(dtype).tobytes())
  file.write(np.array([tokenizer.boundary], dtype).tobytes())


class Windows:
  """`flat` as windows, the i-th `flat[i*L : (i+1)*L + 1]`: each token but the first is a target
  once."""

  def __init__(self, flat: np.ndarray, seq_len: int):
    self._flat, self._seq_len = flat, seq_len
    self._unchanged = cache.Unchanged(flat.filename) if isinstance(flat, np.memmap) else None

  def __len__(self) -> int:
    return (len(self._flat) - 1) // self._seq_len

  def __getitem__(self, i: int) -> np.ndarray:
    if self._unchanged:
      self._unchanged.check()
    start = int(i) * self._seq_len
    return np.asarray(self._flat[start : start + self._seq_len + 1])


class TrainWindows:
  """Endless batches of shuffled windows. The state is the number of batches that were returned."""

  def __init__(
    self, data, tokenizer: Tokenizer, sources: Sequence[Source], rows: Rows, seq_len: int
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
    self._dataset = mix(records, shares, sources, data.seed)
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
    import grain

    dataset = self._dataset
    if (
      self._corruption
    ):  # by the place in the sequence of all rows, so that each epoch masks other spans
      dataset = dataset.map_with_index(
        lambda i, tokens: self._corruption.example(tokens[:-1], "train", i)
      )
    batches = local_rows(dataset, self._rows, self._batches).batch(
      self._rows.size, drop_remainder=True
    )
    if not self._corruption:
      batches = batches.map(functools.partial(batch, boundary=self._boundary))
    ahead = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=4 * self._threads)
    return iter(batches.to_iter_dataset(ahead))

  def get_state(self) -> dict[str, Any]:
    return {"pipeline": "windows", "batches": self._batches}

  def set_state(self, state: Any) -> None:
    """Raises ConfigError for the state of another pipeline, or what is no state."""
    batches = states.windows(state)
    self.close()
    self._batches = batches

  def close(self) -> None:
    if self._iterator is not None:
      self._iterator.close()
    self._iterator = None


def _check_window(source: Source, record: Windows, window: str) -> None:
  if not len(record):
    raise ConfigError(
      "data.sources",
      source.name,
      f"its training documents are shorter than one window of {window}; "
      "add text or lower data.seq_len",
    )


def validation_windows(
  data, tokenizer: Tokenizer, source: Source, rows: Rows, seq_len: int, num_batches: int
) -> Iterator[dict[str, np.ndarray]]:
  """Batches of the windows of the validation split; see `moe_jax.data.validation_batches`."""
  flat = flat_tokens(data, tokenizer, source, "validation")
  corruption = span_corruption(data, tokenizer.size, tokenizer.boundary, seq_len)
  length = corruption.raw if corruption else seq_len
  windows = -(-(len(flat) - 1) // length)
  chosen = np.arange(windows)
  if 0 < num_batches * rows.batch_size < windows:
    wanted = num_batches * rows.batch_size
    chosen = np.arange(wanted) * windows // wanted
  for start in range(0, len(chosen), rows.batch_size):
    mine = chosen[start + rows.first : start + rows.first + rows.size]
    pieces = [flat[window * length : (window + 1) * length + 1] for window in mine]
    pieces += [flat[:0]] * (rows.size - len(pieces))
    if corruption:
      examples = [
        corruption.example(piece[:-1], "validation", window)
        for piece, window in itertools.zip_longest(pieces, mine)
      ]
      yield {name: np.stack([example[name] for example in examples]) for name in examples[0]}
    else:
      yield _next_token(pieces, seq_len, tokenizer.boundary)


def _next_token(pieces: Sequence[np.ndarray], seq_len: int, boundary: int) -> dict[str, np.ndarray]:
  tokens, valid = np.zeros((len(pieces), seq_len + 1), np.int32), np.zeros(len(pieces), np.int32)
  for row, piece in enumerate(pieces):
    tokens[row, : len(piece)], valid[row] = piece, max(len(piece) - 1, 0)
  return batch(tokens, boundary, valid)
