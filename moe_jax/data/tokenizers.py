"""Tokenizers, which map bytes to token ids and back and know how many bytes each id stands for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Int32

from moe_jax.errors import ConfigError, choose


class Tokenizer:
  """The base class of all tokenizers.

  Attributes:
    size: The number of ids, which are in `[0, size)`. It is the number of rows of the embedding.
    boundary: The special id that starts every document. `encode` never returns it.
    eos: A second special id, which ends every document. None means that a document ends where the
      boundary of the next one is.
    byte_lengths: int32 [size] The number of bytes that each id stands for; 0 for special ids.
    fingerprint: A name for the mapping from text to ids. It is the same for the same file, bos and
      eos.
    shown: The value of `data.tokenizer`, for messages.
  """

  size: int
  boundary: int
  eos: int | None = None
  byte_lengths: Int32[np.ndarray, " size"]
  fingerprint: str
  shown: str = "bytes"

  def document(self, text: bytes) -> Int32[np.ndarray, " n"]:
    """Returns the ids of a document: the boundary, the ids of `text`, and `eos` if there is one.

    Raises:
      ConfigError: If the tokenizer returns an id for which the embedding has no row.
    """
    ids = self.encode(text)
    if ids.size and not 0 <= ids.min() <= ids.max() < self.size:
      raise ConfigError(
        "data.tokenizer",
        self.shown,
        f"gives the id {ids.max()}, but its ids are below {self.size}; "
        "give a file whose parts fit together",
      )
    return np.concatenate([[self.boundary], ids, [] if self.eos is None else [self.eos]]).astype(
      np.int32
    )

  def encode(self, text: bytes) -> Int32[np.ndarray, " n"]:
    """Returns the ids of `text`, int32 [n], without the boundary. Any bytes are accepted."""
    raise NotImplementedError

  def decode(self, ids) -> bytes:
    """Returns the bytes that `ids` stand for; special and unused ids stand for none."""
    raise NotImplementedError


class Bytes(Tokenizer):
  """The byte tokenizer, whose ids are the values of the bytes.

  Ids 0..255 are the bytes, and 256 is the boundary. Ids 257..263 are not used; they make the size a
  multiple of 8.
  """

  size = 264
  boundary = 256
  fingerprint = "bytes"

  def __init__(self):
    self.byte_lengths = (np.arange(self.size) < 256).astype(np.int32)

  def encode(self, text: bytes) -> Int32[np.ndarray, " n"]:
    """Returns the values of the bytes of `text`."""
    return np.frombuffer(text, np.uint8).astype(np.int32)

  def decode(self, ids) -> bytes:
    """Returns the bytes of all ids that are below 256."""
    ids = np.asarray(ids).ravel()
    return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes()


# The module of the subword tokenizers is imported only when one is used: the byte tokenizer does
# not need their libraries.
def _sentencepiece(*args):
  from moe_jax.data.subwords import SentencePiece

  return SentencePiece(*args)


def _hugging_face(*args):
  from moe_jax.data.subwords import HuggingFace

  return HuggingFace(*args)


TOKENIZERS: dict[str, Callable[..., Tokenizer]] = {
  "bytes": Bytes,
  "sentencepiece": _sentencepiece,
  "hf": _hugging_face,
}


def make_tokenizer(spec: str, bos: str = "", eos: str = "") -> Tokenizer:
  """Returns the tokenizer that `spec` describes.

  Args:
    spec: `data.tokenizer`, which is `bytes`, `sentencepiece:FILE` or `hf:FILE`.
    bos: `data.bos`, the name of the token that starts every document. "" means the token that the
      file has for this purpose. If there is none, a new id is added, and a note says so.
    eos: `data.eos`, the name of the token that ends every document. "" means that there is none.

  Raises:
    ConfigError: If the kind is unknown, if the file is missing, damaged or of another format, or if
      `bos` or `eos` is not in the vocabulary or can occur in ordinary text.
  """
  kind, colon, path = spec.partition(":")
  build = choose("data.tokenizer", kind, TOKENIZERS, shown=spec)
  if build is Bytes:
    if colon:
      raise ConfigError("data.tokenizer", spec, "the byte tokenizer takes no file; write bytes")
    for field, name in (("data.bos", bos), ("data.eos", eos)):
      if name:
        raise ConfigError(
          field,
          name,
          "the tokenizer 'bytes' has no tokens with names (its documents start with id "
          "256); leave it empty, or set data.tokenizer",
        )
    return Bytes()
  if not path:
    raise ConfigError("data.tokenizer", spec, f"names no file; write {kind}:FILE")
  return build(path, bos, eos)
