"""The ladder of baselines for byte models: n-gram models and LZMA on the same split.

Each rung is the bits per byte of one baseline, from the unigram model to LZMA.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import lzma
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from moe_jax.data import cache
from moe_jax.data.notes import tell
from moe_jax.errors import ConfigError

# The rungs that are n-gram models, as name -> n. The last rung of the ladder is "lzma".
ORDERS = {"unigram": 1, "bigram": 2, "trigram": 3, "4-gram": 4, "5-gram": 5}
_BASE = 257  # 256 byte values, and the mark that pads the start of a document
_VERSION = 1  # Increase this when the figures change because the computation below does.


def ladder(train: Sequence[bytes], validation: Sequence[bytes]) -> dict[str, float]:
  """Returns the bits per byte of the validation documents under baselines of rising strength.

  Args:
    train: The documents that the models are fitted to. If there are none, every n-gram model is
      uniform.
    validation: The documents that the models are scored on, with at least one byte in all.

  Returns:
    {"unigram", "bigram", "trigram", "4-gram", "5-gram", "lzma"} -> bits per byte, in this order.
  """
  # LZMA releases the GIL, so that it runs on a second core meanwhile. The thread is a daemon, so
  # that Ctrl-C does not wait for it.
  packed: list[float] = []
  lzma_thread = threading.Thread(
    target=lambda: packed.append(lzma_bits_per_byte(train, validation)), daemon=True
  )
  lzma_thread.start()
  rungs = witten_bell(train, validation, max(ORDERS.values()))
  lzma_thread.join()
  return {name: float(rungs[n - 1]) for name, n in ORDERS.items()} | {"lzma": packed[0]}


def cached_ladder(
  key: str,
  documents: Callable[[], tuple[Sequence[bytes], Sequence[bytes]] | None],
  cache_dir: str | os.PathLike,
) -> dict[str, float] | None:
  """Returns `ladder(*documents())`, which is cached in `cache_dir` under `key`.

  If the cache is damaged or cannot be written, the figures are computed again.

  Args:
    key: Names the text and its split, e.g. the source's fingerprint with the validation fraction.
    documents: Returns (train, validation). It is called only if the figures are not cached. If it
      returns None, there is no ladder, and nothing is cached.
    cache_dir: The folder of the cache, which is created if it is missing.

  Returns:
    The figures, or None if `documents` returned None.
  """
  digest = hashlib.sha256(f"{_VERSION} {key}".encode()).hexdigest()[:24]
  path = Path(cache_dir) / f"ladder-{digest}.json"
  stored = _stored(path)
  if stored is not None:
    return stored
  texts = documents()
  if texts is None:
    return None
  figures = ladder(*texts)
  # The figures can be returned even if the cache cannot be written.
  with contextlib.suppress(ConfigError):
    text = json.dumps(figures | {"sha256": _digest(figures)})
    cache.replace(path, lambda file: file.write(text.encode()), trailer=False)
  return figures


def _stored(path: Path) -> dict[str, float] | None:
  """Returns the figures of a cache file, or None if the file is missing or damaged.

  A damaged file is reported in a note.
  """
  try:
    stored = json.loads(path.read_bytes())
    digest = stored.pop("sha256")
    if (
      list(stored) == [*ORDERS, "lzma"]
      and all(type(x) is float and math.isfinite(x) for x in stored.values())
      and (digest == _digest(stored))
    ):
      return stored
  except (FileNotFoundError, NotADirectoryError):
    return None
  except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
    pass
  tell(f"{path} is damaged (cut, changed, or from an earlier version) and is computed anew")
  return None


def _digest(figures: dict[str, float]) -> str:
  return hashlib.sha256(json.dumps(figures).encode()).hexdigest()


def witten_bell(
  train: Sequence[bytes], validation: Sequence[bytes], order: int
) -> Float[np.ndarray, "order"]:
  """Returns the bits per byte of validation documents under `WittenBell` models up to `order`.

  Args:
    train: The documents that the models are fitted to.
    validation: The documents that the models are scored on, with at least one byte in all.
    order: The largest n.

  Returns:
    [order] Bits per byte; entry n - 1 is that of the n-gram model. The uniform distribution has
    8.0 bits per byte.
  """
  levels = WittenBell(train, order).probabilities(validation)
  return np.array([-np.log2(probability).mean() for probability in levels])


class WittenBell:
  """Interpolated byte n-grams with Witten-Bell smoothing.

  The models for n = 1 ... order are those of Witten and Bell 1991; Chen and Goodman 1998, Eq. 15:

    p_n(w | h) = (c(h, w) + T(h) p_{n-1}(w | h')) / (c(h) + T(h)),    p_0(w) = 1/256

  Here h is the n - 1 bytes before w, h' is h without its oldest byte, c counts occurrences in the
  training documents, and T(h) is the number of different bytes that occur after h. If a context
  does not occur, p_n equals p_{n-1}. Contexts do not cross documents: the first byte of a document
  follows n - 1 start marks, which are part of contexts and are never predicted.

  Args:
    train: The documents that the models are fitted to.
    order: The largest n.
  """

  def __init__(self, train: Sequence[bytes], order: int):
    grams, counts = np.unique(_grams(train, order), return_counts=True)
    self._order = order
    # The n-gram is the last n symbols of the longer one, hence its remainder modulo 257^n.
    self._tables = [_marginal(grams, counts, _BASE**n) for n in range(1, order + 1)]

  def probabilities(self, documents: Sequence[bytes]) -> Iterator[Float[np.ndarray, "N"]]:
    """Yields p_n of each byte of the documents, one after the other, for n = 1 ... order."""
    wanted = _grams(documents, self._order)
    probability = np.full(len(wanted), 1 / 256)
    for n, (grams, counts) in enumerate(self._tables, 1):
      probability = _interpolate(grams, counts, wanted % _BASE**n, probability)
      yield probability

  def bits_per_byte(self, documents: Sequence[bytes]) -> Float[np.ndarray, "D"]:
    """Returns the bits per byte of each document under the longest n-grams; NaN if it is empty."""
    *_, probability = self.probabilities(documents)
    lengths = np.array([len(document) for document in documents])
    owner = np.repeat(np.arange(len(documents)), lengths)
    total = np.bincount(owner, -np.log2(probability), len(documents))
    return np.where(lengths > 0, total / np.maximum(lengths, 1), np.nan)


def lzma_bits_per_byte(train: Sequence[bytes], validation: Sequence[bytes]) -> float:
  """Returns the cost in bits per byte of the validation documents under LZMA.

  This is the number of bits that the validation documents add to the compressed training documents,
  divided by the number of validation bytes. The dictionary reaches back to the first training byte,
  as the counts of an n-gram model do, if all documents together have at most 1 GiB.
  """
  old, new = b"".join(train), b"".join(validation)
  size = max(1 << 23, 1 << (len(old) + len(new)).bit_length())
  filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": min(size, 1 << 30)}]

  def length(text):
    return len(lzma.compress(text, format=lzma.FORMAT_RAW, filters=filters))

  return 8 * (length(old + new) - length(old)) / len(new)


def _grams(documents: Sequence[bytes], order: int) -> Int[np.ndarray, "N"]:
  """Returns one integer for each byte: its n-gram with n = order, written in base 257.

  The digits are the order - 1 symbols before the byte, the oldest one first, and then the byte.
  """
  padding = np.full(order - 1, 256, np.int64)
  pieces = [p for d in documents for p in (padding, np.frombuffer(d, np.uint8).astype(np.int64))]
  # The last padding only makes room for the shifts below.
  text = np.concatenate([np.zeros(0, np.int64), *pieces, padding])
  keys = np.zeros(max(0, len(text) - (order - 1)), np.int64)
  for i in range(order):
    keys = keys * _BASE + text[i : i + len(keys)]
  # N-grams that end with a start mark are dropped, because start marks are never predicted.
  return keys[keys % _BASE < 256]


def _marginal(grams: Int[np.ndarray, "N"], counts: Int[np.ndarray, "N"], modulus: int):
  """Shortens n-grams to their remainder modulo `modulus`, which drops the oldest symbols.

  Returns:
    The distinct shorter n-grams in ascending order, and the sum of the counts for each of them.
  """
  order = np.argsort(grams % modulus, kind="stable")
  shorter = (grams % modulus)[order]
  first = np.flatnonzero(np.diff(shorter, prepend=-1))
  return shorter[first], np.add.reduceat(counts[order], first) if len(first) else counts


def _interpolate(grams, counts, wanted, lower):
  """Returns p_n of the `wanted` n-grams.

  Args:
    grams: The distinct n-grams of the training documents, sorted.
    counts: The count of each of them.
    wanted: The n-grams to score, one per byte of the validation documents.
    lower: p_{n-1} of the same bytes.
  """
  # The context of an n-gram is its quotient by 257. The n-grams are sorted, so those of one context
  # are adjacent, and `first` is where they start.
  contexts, first, types = np.unique(grams // _BASE, return_index=True, return_counts=True)
  totals = np.add.reduceat(counts, first) if len(first) else counts
  count = _look_up(grams, counts, wanted)
  total = _look_up(contexts, totals, wanted // _BASE)
  distinct = _look_up(contexts, types, wanted // _BASE)
  return np.where(total > 0, (count + distinct * lower) / np.maximum(total + distinct, 1), lower)


def _look_up(keys, values, wanted):
  """Returns `values[i]` where `keys[i] == wanted`, and 0 where no key is equal.

  The keys must be sorted and distinct.
  """
  if not len(keys):
    return np.zeros(len(wanted), np.int64)
  place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
  return np.where(keys[place] == wanted, values[place], 0)
