"""Text in, batches of token windows out, in an order that depends on `data.seed` alone.

A batch is a dict of int32 arrays `[b, L]`, this process's rows (a contiguous block) of the global
batch of B rows:

- `inputs`, `targets`: a stretch of token ids, and the same shifted by one. Every document is
  `boundary` + its tokens, and the target of a document's last token is the boundary of the next.
  With `data.eos` a document's last token is that one; it is a target like others and stands for 0
  bytes, and a report's sample never draws it.
- `segment_ids`: 1, 2, ... for the documents of the window, 0 = padding (only in the last validation
  batch).
- `positions`: restart at 0 at the start of the window and at each boundary.

With data.objective="span_corruption" a row is a window of text with masked spans
(`span_corruption.py`): `targets` are the spans, `inputs` the same shifted right by one, and
`encoder_tokens`, `encoder_segment_ids` and `encoder_positions` `[b, data.encoder_len]` hold the
rest of the window. What follows on bits per byte holds for the other objective only.

Bits per byte: sum the nats of all targets whose segment id is not 0, divide by
`tokenizer.byte_lengths[targets].sum()` over the same targets and by ln 2. A boundary stands for 0
bytes, so its cost counts and its length does not. Validation windows predict each byte of the
validation documents exactly once, so the divisor is the size of the text and the result compares
between tokenizers. (Only a tokenizer that normalises text, or bytes that are not UTF-8 given to a
subword tokenizer, change the divisor: it is the size of the text that the tokens stand for.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

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
  from moe_jax.data.stream import TrainStream  # only this pipeline needs it

  return TrainStream(*args)


_MOST_THREADS = (
  1024  # above any machine's cores; an operating system refuses a process too many of them
)

PIPELINES = {"windows": TrainWindows, "stream": _stream}


def tokenizer_of(data) -> Tokenizer:
  """The tokenizer that `data` (config.data) describes; see `make_tokenizer`."""
  return make_tokenizer(data.tokenizer, data.bos, data.eos)


def vocab_size(data, tokenizer: Tokenizer) -> int:
  """Ids that batches hold: the tokenizer's and, for span corruption, its sentinels'."""
  corruption = span_corruption(data, tokenizer.size, tokenizer.boundary)
  return tokenizer.size + (len(corruption.sentinels) if corruption else 0)


def train_iterator(
  data,
  tokenizer: Tokenizer,
  sources: Sequence[Source],
  batch_size: int,
  seq_len: int | None = None,
  *,
  process_index: int | None = None,
  process_count: int | None = None,
):
  """Endless batches of the mixture of `sources`: `__next__`, `get_state` -> JSON-able dict,
  `set_state`, `close`.

  The global batches are the same for any number of processes; each process gets rows
  `[process_index * b, (process_index + 1) * b)` with `b = batch_size / process_count`. The state
  after n batches is the same on every process and restores on any number of processes.

  Args:
    data: `config.data`.
    batch_size: rows of the global batch.
    seq_len: tokens of a row; None = `data.seq_len`.
    process_index, process_count: which block of rows; None = those of JAX.
  Raises:
    ConfigError: unknown pipeline, weights that do not fit the sources, a source without a whole
      window, rows that do not divide by the processes.
  """
  rows = process_rows(batch_size, process_index, process_count)
  if not 0 <= data.threads <= _MOST_THREADS:
    raise ConfigError(
      "data.threads", data.threads, f"must be from 0 (nothing is read ahead) to {_MOST_THREADS}"
    )
  pipeline = choose("data.pipeline", data.pipeline, PIPELINES)
  return pipeline(data, tokenizer, list(sources), rows, _seq_len(data, seq_len))


def validation_batches(
  data,
  tokenizer: Tokenizer,
  source: Source,
  batch_size: int,
  num_batches: int = 0,
  seq_len: int | None = None,
  *,
  process_index: int | None = None,
  process_count: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
  """The validation documents of `source` as windows in document order; the last batch is padded
  with segment 0.

  With `num_batches` = 0 (or at least as many as there are) every byte is a target exactly once;
  with fewer, the windows are spread evenly over the split. The number of batches is the same on
  every process.
  """
  rows = process_rows(batch_size, process_index, process_count)
  return validation_windows(data, tokenizer, source, rows, _seq_len(data, seq_len), num_batches)


def _seq_len(data, seq_len: int | None) -> int:
  length = data.seq_len if seq_len is None else seq_len
  if length < 1:
    raise ConfigError("data.seq_len", length, "must be at least 1 token")
  return length
