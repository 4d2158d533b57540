"""Bytes to token ids and back, and how many bytes each id stands for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Int32

from moe_jax.errors import ConfigError, choose


class Tokenizer:
  """What every tokenizer has.

  Attributes:
    size: ids are in `[0, size)`; the number of rows of an embedding.
    boundary: the one special id that starts every document; `encode` never returns it.
    eos: a second special id, which ends every document; None = documents end where the next one's
      boundary is.
    byte_lengths: int32 [size], the bytes each id stands for; 0 for special ids.
    fingerprint: names the mapping from text to ids; the same for the same file, bos and eos.
    shown: what `data.tokenizer` says.
  """

  size: int
  boundary: int
  eos: int | None = None
  byte_lengths: Int32[np.ndarray, " size"]
  fingerprint: str
  shown: str = "bytes"

  def document(self, text: bytes) -> Int32[np.ndarray, " n"]:
    """The ids of a whole document: the boundary, those of `text`, and the end where there is one.

    Raises:
      ConfigError: the tokenizer returns an id that no embedding has a row for.
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
    """The ids of `text`, int32 [n], without boundary. Any bytes are accepted."""
    raise NotImplementedError

  def decode(self, ids) -> bytes:
    """The bytes that `ids` stand for; special and unused ids stand for none."""
    raise NotImplementedError


class Bytes(Tokenizer):
  """Ids 0..255 are the bytes, 256 is the boundary; 257..263 do not occur and make the size a
  multiple of 8."""

  size = 264
  boundary = 256
  fingerprint = "bytes"

  def __init__(self):
    self.byte_lengths = (np.arange(self.size) < 256).astype(np.int32)

  def encode(self, text: bytes) -> Int32[np.ndarray, " n"]:
    return np.frombuffer(text, np.uint8).astype(np.int32)

  def decode(self, ids) -> bytes:
    ids = np.asarray(ids).ravel()
    return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes()


def _sentencepiece(*args):
  from moe_jax.data.subwords import (
    SentencePiece,
  )  # imports its library, which the byte tokenizer does without

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
  """`bytes`, `sentencepiece:FILE` or `hf:FILE` -> a tokenizer.

  Args:
    spec: `data.tokenizer`.
    bos: `data.bos`, the name of the token that starts every document; "" = the one that the file
      has for it, or else a new id, which is told in one printed line.
    eos: `data.eos`, the name of a token that ends every document; "" = none.
  Raises:
    ConfigError: unknown kind, a missing, damaged or foreign file, a token that is not there or that
      text can contain.
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
