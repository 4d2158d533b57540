"""Documents by index, and their split into training and validation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from moe_jax.errors import ConfigError


@runtime_checkable
class Documents(Protocol):
  """A random-access sequence of documents; each has a key that does not depend on where the text
  lies."""

  def __len__(self) -> int: ...

  def __getitem__(self, i: int) -> bytes: ...

  def key(self, i: int) -> str: ...


class InMemory:
  """Documents in one array of bytes."""

  def __init__(self, keys: Sequence[str], text: np.ndarray, ends: np.ndarray):
    self._keys, self._text, self._ends = keys, text, ends

  def __len__(self) -> int:
    return len(self._keys)

  def __getitem__(self, i: int) -> bytes:
    start = self._ends[i - 1] if i else 0
    return self._text[start : self._ends[i]].tobytes()

  def key(self, i: int) -> str:
    return str(self._keys[i])


class Subset:
  """Some documents of `parent`, in the order of `indices`."""

  def __init__(self, parent: Documents, indices: Sequence[int] | np.ndarray):
    self._parent, self._indices = parent, indices

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, i: int) -> bytes:
    if not 0 <= i < len(self):
      raise IndexError(i)
    return self._parent[int(self._indices[i])]

  def __iter__(self) -> Iterator[bytes]:
    return (self[i] for i in range(len(self)))

  def key(self, i: int) -> str:
    return self._parent.key(int(self._indices[i]))


def split(name: str, documents: Documents, fraction: float | int) -> dict[str, Subset]:
  """Validation gets the documents whose key hashes below `fraction`; at least one, and leaves at
  least one.

  The hash sees the key alone: a document stays on its side when others come or go.

  Raises:
    ConfigError: there is only one document.
  """
  if not 0 < fraction < 1:
    raise ConfigError("data.validation_fraction", fraction, "must be above 0 and below 1")
  if len(documents) < 2:
    raise ConfigError(
      "data.sources",
      name,
      "has a single document, which cannot be both trained on and held out; add "
      "text (a text file over 64 KiB counts as several documents)",
    )
  hashes = np.fromiter(
    (_hash(documents.key(i)) for i in range(len(documents))), np.float64, len(documents)
  )
  held_out = hashes < fraction
  held_out[hashes.argmin()] = True
  held_out[hashes.argmax()] = False
  sides = {"train": ~held_out, "validation": held_out}
  return {side: Subset(documents, np.flatnonzero(chosen)) for side, chosen in sides.items()}


def _hash(key: str) -> float:
  """In [0, 1)."""
  digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=6).digest()
  return int.from_bytes(digest, "big") / 2.0**48
