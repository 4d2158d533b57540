"""Turns text into batches of token windows, in an order that depends on `data.seed` alone.

A batch is a dict of int32 arrays `[b, L]`. It holds the rows of this process, which are a
contiguous block of the B rows of the global batch:

- `inputs` and `targets` are a stretch of token ids and the same stretch shifted by one. Every
  document is `boundary` followed by its tokens, and the target of a document's last token is the
  boundary of the next document. With `data.eos` every document ends with that token. It is a target
  like any other token, stands for 0 bytes, and is never drawn when the report's sample is written.
- `segment_ids` are 1, 2, ... for the documents of the window, and 0 for padding. Only the last
  validation batch has padding.
- `positions` restart at 0 at the start of the window and at each boundary.

With data.objective="span_corruption" a row is a window of text with masked spans (see
`span_corruption.py`). The `targets` are the spans, and the `inputs` are the targets shifted right
by one. The rest of the window is in `encoder_tokens`, `encoder_segment_ids` and
`encoder_positions`, each `[b, data.encoder_len]`. The following paragraph holds for the objective
"next_token" only.

To compute bits per byte, sum the nats of all targets whose segment id is not 0, then divide by
`tokenizer.byte_lengths[targets].sum()` over the same targets and by ln 2. A boundary stands for 0
bytes, so its cost counts but its length does not. Validation windows predict each byte of the
validation documents exactly once. So the divisor is the size of the text, and the result can be
compared between tokenizers. There are two exceptions: a tokenizer that normalises text, and a
subword tokenizer that reads bytes that are not UTF-8. Then the divisor is the size of the text that
the tokens stand for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from moe_jax.data.options import DataOptions
from moe_jax.data.rows import Rows, process_rows
from moe_jax.data.sources import Source, fingerprints, make_sources
from moe_jax.data.span_corruption import span_corruption
from moe_jax.data.states import batches_of
from moe_jax.data.tokenizers import Tokenizer, make_tokenizer
from moe_jax.data.windows import TrainWindows, validation_windows
from moe_jax.errors import ConfigError, choose

__all__ = [
  "PIPELINES",
  "Rows",
  "Source",
  "Tokenizer",
  "batches_of",
  "fingerprints",
  "make_sources",
  "make_tokenizer",
  "tokenizer_of",
  "train_iterator",
  "validation_batches",
  "vocab_size",
]


def _stream(*args):
  # Imported here because only this pipeline needs it.
  from moe_jax.data.stream import TrainStream

  return TrainStream(*args)


# This is more than the cores of any machine. Operating systems limit the threads of a process.
_MOST_THREADS = 1024

PIPELINES = {"windows": TrainWindows, "stream": _stream}


def tokenizer_of(data: DataOptions) -> Tokenizer:
  """Returns the tokenizer that `data` describes; see `make_tokenizer`."""
  return make_tokenizer(data.tokenizer, data.bos, data.eos)


def vocab_size(data: DataOptions, tokenizer: Tokenizer) -> int:
  """Returns the number of token ids in batches, including the sentinels of span corruption."""
  corruption = span_corruption(data, tokenizer.size, tokenizer.boundary)
  return tokenizer.size + (len(corruption.sentinels) if corruption else 0)


def train_iterator(
  data: DataOptions,
  tokenizer: Tokenizer,
  sources: Sequence[Source],
  batch_size: int,
  seq_len: int | None = None,
  *,
  process_index: int | None = None,
  process_count: int | None = None,
):
  """Returns an endless iterator over training batches of the mixture of `sources`.

  The iterator has the methods `__next__`, `get_state` (which returns a dict that JSON can hold),
  `set_state` and `close`. That of pipeline "windows" also has `shares`, `change_shares` and
  `take_shares`, with which the shares of the sources change during training (`dynamic.py`).

  The global batches are the same for any number of processes. Each process gets the rows
  `[process_index * b, (process_index + 1) * b)` with `b = batch_size / process_count`. The state
  after n batches is the same on every process and can be restored on any number of processes.

  Args:
    data: The options of the data.
    tokenizer: The tokenizer of all sources.
    sources: The sources, in the order of `data.weights`.
    batch_size: Number of rows of the global batch.
    seq_len: Number of tokens of a row. None means `data.seq_len`.
    process_index: The process whose rows are returned. None means JAX's process index.
    process_count: The number of processes. None means JAX's process count.

  Raises:
    ConfigError: If the pipeline is unknown, the weights do not fit the sources, a source does not
      have enough text, `data.threads` or the sequence length is out of range, or `batch_size` is
      not a multiple of the number of processes.
  """
  rows = process_rows(batch_size, process_index, process_count)
  if not 0 <= data.threads <= _MOST_THREADS:
    raise ConfigError(
      "data.threads", data.threads, f"must be from 0 (nothing is read ahead) to {_MOST_THREADS}"
    )
  pipeline = choose("data.pipeline", data.pipeline, PIPELINES)
  return pipeline(data, tokenizer, list(sources), rows, _seq_len(data, seq_len))


def validation_batches(
  data: DataOptions,
  tokenizer: Tokenizer,
  source: Source,
  batch_size: int,
  num_batches: int = 0,
  seq_len: int | None = None,
  *,
  process_index: int | None = None,
  process_count: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
  """Yields batches of windows of the validation documents of `source`, in document order.

  The last batch is padded with rows of segment 0. The number of batches is the same on every
  process.

  Args:
    data: The options of the data.
    tokenizer: The tokenizer of the source.
    source: The source whose validation documents are read.
    batch_size: Number of rows of the global batch.
    num_batches: The number of batches to yield. With 0, or if there are not more batches than that,
      every byte is a target exactly once. Otherwise the windows are spread evenly over the split.
    seq_len: Number of tokens of a row. None means `data.seq_len`.
    process_index: The process whose rows are returned. None means JAX's process index.
    process_count: The number of processes. None means JAX's process count.

  Raises:
    ConfigError: If the sequence length is below 1, or if `batch_size` is not a multiple of the
      number of processes.
  """
  rows = process_rows(batch_size, process_index, process_count)
  return validation_windows(data, tokenizer, source, rows, _seq_len(data, seq_len), num_batches)


def _seq_len(data: DataOptions, seq_len: int | None) -> int:
  """Returns `seq_len`, or `data.seq_len` if it is None, after checking that it is positive."""
  length = data.seq_len if seq_len is None else seq_len
  if length < 1:
    raise ConfigError("data.seq_len", length, "must be at least 1 token")
  return length
