"""Pipeline `stream`: documents are tokenised and packed while training reads them.

It is meant for text that is too large to tokenise beforehand: no tokens are stored on disk. The
documents are mixed into one endless sequence, in which the shares of the sources count documents
and not tokens. Row r of the global batch reads documents r, r + B, r + 2B, ... and cuts their
tokens into windows. So the batches are the same for any number of processes, and the position of a
row consists of two integers. There must be at least as many documents as rows, because otherwise
several rows would read the same text side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np
from grain import experimental as grain_experimental

from moe_jax.data import states
from moe_jax.data.mixture import mix, weights
from moe_jax.data.options import DataOptions
from moe_jax.data.rows import Rows, batch
from moe_jax.data.sources import Source
from moe_jax.data.span_corruption import SpanCorruption, span_corruption
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.errors import ConfigError


class Row:
  """The endless sequence of the tokens of one row of the global batch.

  The row reads the documents `first`, `first + stride`, ... of `dataset`. Each document begins with
  a boundary.

  Args:
    dataset: The endless sequence of documents.
    tokenizer: The tokenizer.
    first: The index of the row's first document.
    stride: Number of rows of the global batch.
    position: The position at which to start; see the attribute of this name.

  Attributes:
    first: The index of the row's first document, which is also that of the row in the global batch.
    position: The (document, offset) of the first input of the next window. `document` counts the
      documents of this row from 0, and `offset` counts the tokens of that document, where 0 is its
      boundary.

  Raises:
    ConfigError: If the document at `position` has no token at that offset.
  """

  def __init__(
    self, dataset, tokenizer: Tokenizer, first: int, stride: int, position: tuple[int, int]
  ):
    self._dataset, self._tokenizer, self.first, self._stride = dataset, tokenizer, first, stride
    document, offset = self.position = position
    # The first document of this row that is not tokenised yet.
    self._next_document = document
    # The ends of the tokenised documents, counted in tokens from the start of the document at
    # `position`.
    self._ends: list[int] = []
    # The tokens of these documents from `position` on.
    self._tokens = np.zeros(0, np.int32)
    if offset:
      self._read()
      if offset >= len(self._tokens):
        raise ConfigError(
          "checkpoint",
          "data position",
          f"row {first} of the batch stands at token {offset} of a document of "
          f"{len(self._tokens)} tokens; the checkpoint is damaged or of other data: resume from "
          "another one, or begin a new run in another --workdir",
        )
      self._tokens = self._tokens[offset:]

  def _read(self) -> None:
    """Tokenises the next document and appends its tokens."""
    text = self._dataset[self.first + self._next_document * self._stride]
    tokens = self._tokenizer.document(text)
    self._next_document += 1
    self._ends.append(len(tokens) + (self._ends[-1] if self._ends else 0))
    self._tokens = np.concatenate([self._tokens, tokens])

  def window(self, seq_len: int) -> np.ndarray:
    """Returns the next `seq_len` + 1 tokens, int32, and advances the position by `seq_len`."""
    while len(self._tokens) <= seq_len:
      self._read()
    # The last token of a window is the first one of the next, because it is a target first and then
    # an input.
    out, self._tokens = self._tokens[: seq_len + 1], self._tokens[seq_len:]
    document, offset = self.position
    offset += seq_len
    # Skip the documents that end before the new position.
    while self._ends and self._ends[0] <= offset:
      length = self._ends.pop(0)
      document, offset = document + 1, offset - length
      self._ends = [end - length for end in self._ends]
    self.position = document, offset
    return out


class TrainStream:
  """An endless iterator over batches of packed documents.

  The state consists of the position of each row after the last batch that was returned, and of the
  number of these batches.

  Args:
    data: The options of the data.
    tokenizer: The tokenizer of all sources.
    sources: The sources of the mixture.
    rows: The rows of the global batch that this process reads.
    seq_len: Number of tokens of a row.

  Raises:
    ConfigError: If rows of a batch would read the same text at the same time, or if the weights do
      not fit the sources.
  """

  def __init__(
    self,
    data: DataOptions,
    tokenizer: Tokenizer,
    sources: Sequence[Source],
    rows: Rows,
    seq_len: int,
  ):
    documents = [source.documents("train") for source in sources]
    shares = weights(data.weights, sources, [len(d) for d in documents])
    for source, share in zip(sources, shares, strict=True):
      _check_rows(source, share, rows.batch_size)
    self._dataset = mix(documents, shares, sources, data.seed)
    self._tokenizer, self._rows, self._seq_len, self._threads = (
      tokenizer,
      rows,
      seq_len,
      data.threads,
    )
    self._corruption = span_corruption(data, tokenizer.size, tokenizer.boundary, seq_len)
    self._positions = np.zeros((rows.size, 2), np.int64)
    # None if the number of batches is unknown, because the restored state did not contain it.
    self._batches: int | None = 0
    self._iterator = None

  def __iter__(self):
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    if self._iterator is None:
      self._iterator = iter(
        grain_experimental.ThreadPrefetchIterDataset(
          _Batches(
            self._make_rows,
            self._seq_len,
            self._threads,
            self._tokenizer.boundary,
            self._corruption,
          ),
          prefetch_buffer_size=2 if self._threads else 0,
        )
      )
    out = next(self._iterator)
    self._positions = out.pop("positions_of_rows")
    self._batches = None if self._batches is None else self._batches + 1
    return out

  def _make_rows(self) -> list[Row]:
    """Returns the rows of this process at their current positions."""
    return [
      Row(
        self._dataset,
        self._tokenizer,
        self._rows.first + r,
        self._rows.batch_size,
        (document, offset),
      )
      for r, (document, offset) in enumerate(self._positions.tolist())
    ]

  def get_state(self) -> dict[str, Any]:
    """Returns the state, with the positions of all rows of the global batch.

    If there are several processes, all of them must call this, because the positions are gathered.
    """
    index = np.arange(self._rows.first, self._rows.first + self._rows.size)
    table = gather(np.concatenate([index[:, None], self._positions], axis=1))
    rows = {str(row): [document, offset] for row, document, offset in table.tolist()}
    batches = {} if self._batches is None else {"batches": self._batches}
    return {"pipeline": "stream", "batch_size": self._rows.batch_size, "rows": rows} | batches

  def set_state(self, state: Any) -> None:
    """Continues from a state that `get_state` returned.

    Raises:
      ConfigError: If `state` is not valid, or if it is one of another pipeline or batch size.
    """
    positions, batches = states.stream(state, self._rows.batch_size)
    self.close()
    self._positions = positions[self._rows.first : self._rows.first + self._rows.size]
    self._batches = batches

  def close(self) -> None:
    """Stops reading ahead; the next batch starts a new iterator."""
    if self._iterator is not None:
      self._iterator.close()
    self._iterator = None


def _check_rows(source: Source, share: float, batch_size: int) -> None:
  """Raises ConfigError if more rows of a batch read a source than it has documents.

  In that case some rows would start in the same document. All rows read at the same pace, so these
  rows would stay side by side, and each batch would contain the same text several times.
  """
  documents = len(source.documents("train"))
  # The sources are interleaved evenly. The small number allows for rounding errors of the share.
  num_rows = math.ceil(share * batch_size - 1e-9)
  if num_rows > documents:
    raise ConfigError(
      "data.sources",
      source.name,
      f"has {documents} training documents for {num_rows} of the {batch_size} rows of a batch, so "
      "that rows of pipeline stream would hold the same text; set "
      "--config.data.pipeline=windows, or lower train.batch_size or its share in data.weights",
    )


class _Batches(grain.IterDataset):
  """A dataset of batches, each of which contains the positions of the rows after it.

  The batches are prefetched, so the positions of the rows themselves are ahead of those of the last
  batch that was returned.
  """

  def __init__(
    self, make_rows, seq_len: int, threads: int, boundary: int, corruption: SpanCorruption | None
  ):
    super().__init__()
    self._args = make_rows, seq_len, threads, boundary, corruption

  def __iter__(self):
    return _BatchIterator(*self._args)


class _BatchIterator(grain.DatasetIterator):
  """The iterator of `_Batches`."""

  def __init__(
    self, make_rows, seq_len: int, threads: int, boundary: int, corruption: SpanCorruption | None
  ):
    super().__init__()
    # Set before anything can fail, because Grain calls `close` even if this constructor raises.
    self._pool = None
    self._rows, self._seq_len, self._boundary, self._corruption = (
      make_rows(),
      seq_len,
      boundary,
      corruption,
    )
    self._pool = ThreadPoolExecutor(threads) if threads else None

  def __next__(self) -> dict[str, np.ndarray]:
    map_rows = self._pool.map if self._pool else map
    if corruption := self._corruption:
      rows = list(map_rows(lambda row: self._corrupted(corruption, row), self._rows))
      out = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    else:
      out = batch(
        np.stack(list(map_rows(lambda row: row.window(self._seq_len), self._rows))), self._boundary
      )
    return out | {"positions_of_rows": np.array([r.position for r in self._rows], np.int64)}

  @staticmethod
  def _corrupted(corruption: SpanCorruption, row: Row) -> dict[str, np.ndarray]:
    """Returns the next row with masked spans."""
    # The key is different for each window of each row.
    key = row.first, *row.position
    return corruption.example(row.window(corruption.raw)[:-1], "stream", *key)

  def close(self) -> None:
    if self._pool:
      self._pool.shutdown()
    super().close()

  def get_state(self) -> dict[str, Any]:
    # TrainStream keeps the positions itself and starts a new iterator to continue from a state.
    return {}

  def set_state(self, state: dict[str, Any]) -> None:
    raise NotImplementedError


def gather(table: np.ndarray) -> np.ndarray:
  """Concatenates the rows of the int64 tables of all processes.

  If JAX has only one process, this returns `table` itself.
  """
  import jax

  if jax.process_count() == 1:
    return table
  from jax.experimental import multihost_utils

  # Each int64 is sent as two int32, because JAX would truncate it to int32.
  halves = np.ascontiguousarray(table, "<i8").view("<i4")
  return (
    np.asarray(multihost_utils.process_allgather(halves))
    .reshape(-1, halves.shape[-1])
    .copy()
    .view("<i8")
  )
