"""Pipeline `stream`: documents are tokenised and packed while training reads them; their tokens are
not kept on disk.

For text too large to tokenise beforehand. Documents are mixed (shares count documents, not tokens)
into one endless sequence; row r of the global batch reads documents r, r + B, r + 2B, ... and cuts
their tokens into windows. So the batches are the same for any number of processes, and a row's
position is two integers. There must be as many documents as rows, or several rows would read the
same text side by side.
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
from moe_jax.data.rows import Rows, batch
from moe_jax.data.sources import Source
from moe_jax.data.span_corruption import SpanCorruption, span_corruption
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.errors import ConfigError


class Row:
  """The endless tokens of one row: documents `first`, `first + stride`, ... of `dataset`, each
  behind a boundary.

  A position that its document does not have is a ConfigError.

  Attributes:
    first: its first document; the row's place in the global batch.
    position: (document, offset) of the first input of the next window: the how-manieth document of
      this row, and which of its tokens (0 = its boundary).
  """

  def __init__(
    self, dataset, tokenizer: Tokenizer, first: int, stride: int, position: tuple[int, int]
  ):
    self._dataset, self._tokenizer, self.first, self._stride = dataset, tokenizer, first, stride
    document, offset = self.position = position
    self._next_document = document  # the first one that was not tokenised
    self._ends: list[
      int
    ] = []  # of the tokenised documents from `document` on, counted from its start
    self._tokens = np.zeros(0, np.int32)  # of these documents, from `position` on
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
    text = self._dataset[self.first + self._next_document * self._stride]
    tokens = self._tokenizer.document(text)
    self._next_document += 1
    self._ends.append(len(tokens) + (self._ends[-1] if self._ends else 0))
    self._tokens = np.concatenate([self._tokens, tokens])

  def window(self, seq_len: int) -> np.ndarray:
    """The next `seq_len` tokens and the one after, int32 [seq_len + 1]; moves on by `seq_len`."""
    while len(self._tokens) <= seq_len:
      self._read()
    out, self._tokens = self._tokens[: seq_len + 1], self._tokens[seq_len:]
    document, offset = self.position
    offset += seq_len
    while self._ends and self._ends[0] <= offset:
      done = self._ends.pop(0)
      document, offset, self._ends = document + 1, offset - done, [end - done for end in self._ends]
    self.position = document, offset
    return out


class TrainStream:
  """Endless batches of packed documents. The state is where each row stands after the last one, and
  their number.

  Raises:
    ConfigError: rows of a batch would read the same text at the same time.
  """

  def __init__(
    self, data, tokenizer: Tokenizer, sources: Sequence[Source], rows: Rows, seq_len: int
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
    self._batches: int | None = 0  # None after a state that does not know it
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
    """Gathers the positions of all processes where there are several: each of them has to call
    it."""
    index = np.arange(self._rows.first, self._rows.first + self._rows.size)
    table = gather(np.concatenate([index[:, None], self._positions], axis=1))
    rows = {str(row): [document, offset] for row, document, offset in table.tolist()}
    known = {} if self._batches is None else {"batches": self._batches}
    return {"pipeline": "stream", "batch_size": self._rows.batch_size, "rows": rows} | known

  def set_state(self, state: Any) -> None:
    """Raises ConfigError for the state of another pipeline or another batch size, or what is no
    state."""
    positions, batches = states.stream(state, self._rows.batch_size)
    self.close()
    self._positions = positions[self._rows.first : self._rows.first + self._rows.size]
    self._batches = batches

  def close(self) -> None:
    if self._iterator is not None:
      self._iterator.close()
    self._iterator = None


def _check_rows(source: Source, share: float, batch_size: int) -> None:
  """Refuses a batch of which more rows read a source than it has documents.

  Some rows would start in the same document, and as each reads on at the same pace they would stay
  side by side in it, and in the next where there is only one: the batch would hold the same text
  several times.
  """
  documents = len(source.documents("train"))
  wanted = math.ceil(
    share * batch_size - 1e-9
  )  # shares are interleaved evenly; the rest is rounding of the share
  if wanted > documents:
    raise ConfigError(
      "data.sources",
      source.name,
      f"has {documents} training documents for {wanted} of the {batch_size} rows of a batch, so "
      "that rows of pipeline stream would hold the same text; set "
      "--config.data.pipeline=windows, or lower train.batch_size or its share in data.weights",
    )


class _Batches(grain.IterDataset):
  """Batches with the positions after them, so that what is read ahead does not count as read."""

  def __init__(
    self, make_rows, seq_len: int, threads: int, boundary: int, corruption: SpanCorruption | None
  ):
    super().__init__()
    self._args = make_rows, seq_len, threads, boundary, corruption

  def __iter__(self):
    return _BatchIterator(*self._args)


class _BatchIterator(grain.DatasetIterator):
  def __init__(
    self, make_rows, seq_len: int, threads: int, boundary: int, corruption: SpanCorruption | None
  ):
    super().__init__()
    self._pool = None  # before anything can fail: Grain closes what was never finished, too
    self._rows, self._seq_len, self._boundary, self._corruption = (
      make_rows(),
      seq_len,
      boundary,
      corruption,
    )
    self._pool = ThreadPoolExecutor(threads) if threads else None

  def __next__(self) -> dict[str, np.ndarray]:
    each = self._pool.map if self._pool else map
    if self._corruption:
      rows = list(each(self._corrupted, self._rows))
      out = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    else:
      out = batch(
        np.stack(list(each(lambda row: row.window(self._seq_len), self._rows))), self._boundary
      )
    return out | {"positions_of_rows": np.array([r.position for r in self._rows], np.int64)}

  def _corrupted(self, row: Row) -> dict[str, np.ndarray]:
    key = row.first, *row.position  # each window of each row has its own
    return self._corruption.example(row.window(self._corruption.raw)[:-1], "stream", *key)

  def close(self) -> None:
    if self._pool:
      self._pool.shutdown()
    super().close()

  def get_state(self) -> dict[str, Any]:
    return {}  # TrainStream starts a new iterator at its own positions instead

  def set_state(self, state: dict[str, Any]) -> None:
    raise NotImplementedError


def gather(table: np.ndarray) -> np.ndarray:
  """The rows of every process's int64 table, one below the other; `table` itself where JAX has one
  process."""
  import jax

  if jax.process_count() == 1:
    return table
  from jax.experimental import multihost_utils

  halves = np.ascontiguousarray(table, "<i8").view("<i4")  # JAX would cut int64 to int32
  return (
    np.asarray(multihost_utils.process_allgather(halves))
    .reshape(-1, halves.shape[-1])
    .copy()
    .view("<i8")
  )
