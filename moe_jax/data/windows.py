"""Pipeline `windows`: each source is tokenised once into a flat file; training shuffles its windows globally."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
from absl import logging

from moe_jax.data import cache
from moe_jax.data.documents import Subset
from moe_jax.data.mixture import local_rows, mix, weights
from moe_jax.data.rows import Rows, batch
from moe_jax.data.sources import Source
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.errors import ConfigError

_FORMAT = 1  # changes with what is in a flat file


def flat_tokens(data, tokenizer: Tokenizer, source: Source, split: str) -> np.ndarray:
  """boundary, tokens of document 0, boundary, tokens of document 1, ..., boundary: memory-mapped from the cache."""
  dtype = np.dtype("<u2" if tokenizer.size <= 2**16 else "<u4")
  documents = source.documents(split)
  parts = (_FORMAT, source.name, source.fingerprint, split, data.validation_fraction, data.validation_split,
           data.text_field, tokenizer.fingerprint, dtype.str)
  path = cache.cache_dir(data.cache_dir) / f"tokens-{cache.key(*parts)}.{dtype.str[1:]}"
  cache.built(path, functools.partial(_tokenise, tokenizer, documents, dtype, f"{source.name} ({split})"))
  return np.memmap(path, dtype, "r")


def _tokenise(tokenizer: Tokenizer, documents: Subset, dtype: np.dtype, name: str, file: BinaryIO) -> None:
  logging.info("tokenising %s: %d documents (once)", name, len(documents))
  boundary = np.array([tokenizer.boundary], dtype).tobytes()
  for text in documents:
    file.write(boundary)
    file.write(tokenizer.encode(text).astype(dtype).tobytes())
  file.write(boundary)


class Windows:
  """`flat` as windows, the i-th `flat[i*L : (i+1)*L + 1]`: each token but the first is a target once."""

  def __init__(self, flat: np.ndarray, seq_len: int):
    self._flat, self._seq_len = flat, seq_len

  def __len__(self) -> int:
    return (len(self._flat) - 1) // self._seq_len

  def __getitem__(self, i: int) -> np.ndarray:
    start = int(i) * self._seq_len
    return np.asarray(self._flat[start:start + self._seq_len + 1])


class TrainWindows:
  """Endless batches of shuffled windows. The state is the number of batches that were returned."""

  def __init__(self, data, tokenizer: Tokenizer, sources: Sequence[Source], rows: Rows, seq_len: int):
    records = [Windows(flat_tokens(data, tokenizer, source, "train"), seq_len) for source in sources]
    shares = weights(data.weights, sources, [max(1, len(r)) for r in records])
    for source, record, share in zip(sources, records, shares, strict=True):
      if share > 0:
        _check_window(source, record, seq_len)
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
    local = local_rows(self._dataset, self._rows, self._batches)
    ahead = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=4 * self._threads)
    batches = local.batch(self._rows.size, drop_remainder=True).map(functools.partial(batch, boundary=self._boundary))
    return iter(batches.to_iter_dataset(ahead))

  def get_state(self) -> dict[str, Any]:
    return {"pipeline": "windows", "batches": self._batches}

  def set_state(self, state: dict[str, Any]) -> None:
    """Raises ConfigError for the state of another pipeline."""
    if state.get("pipeline") != "windows":
      raise ConfigError("data.pipeline", "windows", f"the saved position is one of pipeline {state.get('pipeline')!r}")
    self.close()
    self._batches = int(state["batches"])

  def close(self) -> None:
    if self._iterator is not None:
      self._iterator.close()
    self._iterator = None


def _check_window(source: Source, record: Windows, seq_len: int) -> None:
  if not len(record):
    raise ConfigError("data.sources", source.name, f"its training documents are shorter than one window of data.seq_len"
                      f"={seq_len} tokens; add text or lower data.seq_len")


def validation_windows(data, tokenizer: Tokenizer, source: Source, rows: Rows, seq_len: int,
                       num_batches: int) -> Iterator[dict[str, np.ndarray]]:
  """Batches of the windows of the validation split; see `moe_jax.data.validation_batches`."""
  flat = flat_tokens(data, tokenizer, source, "validation")
  targets = len(flat) - 1
  windows = -(-targets // seq_len)
  chosen = np.arange(windows)
  if 0 < num_batches * rows.batch_size < windows:
    wanted = num_batches * rows.batch_size
    chosen = np.arange(wanted) * windows // wanted
  for start in range(0, len(chosen), rows.batch_size):
    mine = chosen[start + rows.first:start + rows.first + rows.size]
    tokens, valid = np.zeros((rows.size, seq_len + 1), np.int32), np.zeros(rows.size, np.int32)
    for row, window in enumerate(mine):
      piece = flat[window * seq_len:(window + 1) * seq_len + 1]
      tokens[row, :len(piece)], valid[row] = piece, len(piece) - 1
    yield batch(tokens, tokenizer.boundary, valid)
