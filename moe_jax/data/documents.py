"""Documents by index, and their split into training and validation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from moe_jax.errors import ConfigError


@runtime_checkable
class Documents(Protocol):
  """A random-access sequence of documents.

  Each document has a key, which does not depend on where the text is stored.
  """

  def __len__(self) -> int: ...

  def __getitem__(self, i: int) -> bytes: ...

  def key(self, i: int) -> str:
    """Returns the key of document `i`."""
    ...


class InMemory:
  """Documents that are held in one array of bytes.

  Args:
    keys: The key of each document.
    text: [N] uint8, all documents one after the other.
    ends: The end of each document in `text`.
  """

  def __init__(self, keys: Sequence[str], text: np.ndarray, ends: np.ndarray):
    self._keys, self._text, self._ends = keys, text, ends

  def __len__(self) -> int:
    return len(self._keys)

  def __getitem__(self, i: int) -> bytes:
    start = self._ends[i - 1] if i else 0
    return self._text[start : self._ends[i]].tobytes()

  def key(self, i: int) -> str:
    """Returns the key of document `i`."""
    return str(self._keys[i])


class Subset:
  """The documents of `parent` at `indices`, in that order."""

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
    """Returns the key of the subset's document `i`."""
    return self._parent.key(int(self._indices[i]))


def split(name: str, documents: Documents, fraction: float | int) -> dict[str, Subset]:
  """Splits documents into training and validation by a hash of their keys.

  A document is held out for validation if its key hashes below `fraction`. Only the key is hashed,
  so a document stays in its part when other documents are added or removed. Each part gets at least
  one document.

  Args:
    name: The name of the source, for messages.
    documents: All documents of the source.
    fraction: The expected share of the documents that are held out, above 0 and below 1. 1 holds
      out all documents, which is for text that no model trains on.

  Returns:
    The parts "train" and "validation".

  Raises:
    ConfigError: If `fraction` is out of range, or if there are fewer than two documents.
  """
  if fraction == 1:
    everything = np.arange(len(documents))
    return {"train": Subset(documents, everything[:0]), "validation": Subset(documents, everything)}
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
    (uniform(documents.key(i)) for i in range(len(documents))), np.float64, len(documents)
  )
  held_out = hashes < fraction
  held_out[hashes.argmin()] = True
  held_out[hashes.argmax()] = False
  sides = {"train": ~held_out, "validation": held_out}
  return {side: Subset(documents, np.flatnonzero(chosen)) for side, chosen in sides.items()}


def uniform(key: str) -> float:
  """Maps a key to a uniformly distributed number in [0, 1)."""
  digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=6).digest()
  return int.from_bytes(digest, "big") / 2.0**48
