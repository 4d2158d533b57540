"""What a byte model must beat: n-gram models and LZMA on the same split, in bits per byte."""

from __future__ import annotations

import contextlib
import hashlib
import json
import lzma
import math
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from moe_jax.data import cache
from moe_jax.data.notes import tell
from moe_jax.errors import ConfigError

ORDERS = {
  "unigram": 1,
  "bigram": 2,
  "trigram": 3,
  "4-gram": 4,
  "5-gram": 5,
}  # rung -> n; "lzma" is the last rung
_BASE = 257  # 256 byte values and the mark that pads a document's start
_VERSION = 1  # of the figures: raise it when the arithmetic below changes


def ladder(train: Sequence[bytes], validation: Sequence[bytes]) -> dict[str, float]:
  """Bits per byte of the validation documents under models of rising strength that know the
  training documents.

  Args:
    train: documents the models are fitted to; may be empty (then every n-gram model is uniform).
    validation: documents they are scored on, at least one byte in all.

  Returns:
    {"unigram", "bigram", "trigram", "4-gram", "5-gram", "lzma"} -> bits per byte, in this order.
  """
  # LZMA releases the GIL, so that a second core does it meanwhile. Ctrl-C need not wait for a
  # daemon thread.
  packed: list[float] = []
  other = threading.Thread(
    target=lambda: packed.append(lzma_bits_per_byte(train, validation)), daemon=True
  )
  other.start()
  rungs = witten_bell(train, validation, max(ORDERS.values()))
  other.join()
  return {name: float(rungs[n - 1]) for name, n in ORDERS.items()} | {"lzma": packed[0]}


def cached_ladder(
  key: str,
  documents: Callable[[], tuple[Sequence[bytes], Sequence[bytes]] | None],
  cache_dir: str | os.PathLike,
) -> dict[str, float] | None:
  """`ladder(*documents())`, remembered in `cache_dir` under `key`; a damaged or unwritable cache is
  only slower.

  Args:
    key: names the text and its split, e.g. the source's fingerprint with the validation fraction.
    documents: gives (train, validation); called only if the figures are not there yet. None = no
      ladder, for this once.
    cache_dir: folder, made if missing.
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
  with contextlib.suppress(ConfigError):  # the figures are here all the same
    text = json.dumps(figures | {"sha256": _digest(figures)})
    cache.replace(path, lambda file: file.write(text.encode()), trailer=False)
  return figures


def _stored(path: Path) -> dict[str, float] | None:
  """The figures of a cache file; None where there are none that can be believed, which is told if
  the file is there."""
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
  """Bits per byte of interpolated byte n-grams, n = 1 ... order (Witten and Bell 1991; Chen and
  Goodman 1998, Eq. 15).

    p_n(w | h) = (c(h, w) + T(h) p_{n-1}(w | h')) / (c(h) + T(h)),    p_0(w) = 1/256

  where h is the n - 1 bytes before w, h' is h without its oldest byte, c counts occurrences in the
  training documents and T(h) is the number of different bytes seen after h. A context never seen
  leaves p_{n-1}. Contexts do not cross documents: the first byte of a document follows n - 1 start
  marks, which are part of contexts and never predicted.

  Returns:
    [order] bits per byte: entry n - 1 is the n-gram's. 8.0 is the uniform distribution's.
  """
  grams, counts = np.unique(_grams(train, order), return_counts=True)
  wanted = _grams(validation, order)
  probability = np.full(len(wanted), 1 / 256)
  bits = np.zeros(order)
  for n in range(1, order + 1):
    seen, seen_counts = _marginal(grams, counts, _BASE**n)
    probability = _interpolate(seen, seen_counts, wanted % _BASE**n, probability)
    bits[n - 1] = -np.log2(probability).mean()
  return bits


def lzma_bits_per_byte(train: Sequence[bytes], validation: Sequence[bytes]) -> float:
  """Bits that the validation documents add to the compressed training documents, over the
  validation bytes.

  The dictionary reaches back to the first training byte, as an n-gram's counts do.
  """
  known, new = b"".join(train), b"".join(validation)
  size = max(1 << 23, 1 << (len(known) + len(new)).bit_length())
  filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": min(size, 1 << 30)}]

  def length(text):
    return len(lzma.compress(text, format=lzma.FORMAT_RAW, filters=filters))

  return 8 * (length(known + new) - length(known)) / len(new)


def _grams(documents: Sequence[bytes], order: int) -> Int[np.ndarray, "N"]:
  """One number a byte: itself and the order - 1 symbols before it, the oldest most significant, in
  base 257."""
  padding = np.full(order - 1, 256, np.int64)
  pieces = [p for d in documents for p in (padding, np.frombuffer(d, np.uint8).astype(np.int64))]
  text = np.concatenate(
    [np.zeros(0, np.int64), *pieces, padding]
  )  # the last padding only completes the shifts below
  keys = np.zeros(max(0, len(text) - (order - 1)), np.int64)
  for i in range(order):
    keys = keys * _BASE + text[i : i + len(keys)]
  return keys[keys % _BASE < 256]  # no start mark is predicted


def _marginal(grams: Int[np.ndarray, "N"], counts: Int[np.ndarray, "N"], modulus: int):
  """The distinct n-grams within longer ones, sorted, with their counts: drop the oldest symbols and
  add up."""
  order = np.argsort(grams % modulus, kind="stable")
  shorter = (grams % modulus)[order]
  first = np.flatnonzero(np.diff(shorter, prepend=-1))
  return shorter[first], np.add.reduceat(counts[order], first) if len(first) else counts


def _interpolate(grams, counts, wanted, lower):
  """p_n of the `wanted` n-grams, given the training n-grams with their counts and p_{n-1} of the
  same bytes."""
  contexts, first, types = np.unique(
    grams // _BASE, return_index=True, return_counts=True
  )  # grams are sorted
  totals = np.add.reduceat(counts, first) if len(first) else counts
  count = _look_up(grams, counts, wanted)
  total = _look_up(contexts, totals, wanted // _BASE)
  distinct = _look_up(contexts, types, wanted // _BASE)
  return np.where(total > 0, (count + distinct * lower) / np.maximum(total + distinct, 1), lower)


def _look_up(keys, values, wanted):
  """`values[i]` where `keys[i] == wanted`, else 0; `keys` is sorted and without repeats."""
  if not len(keys):
    return np.zeros(len(wanted), np.int64)
  place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
  return np.where(keys[place] == wanted, values[place], 0)
