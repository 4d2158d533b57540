"""Bytes to token ids and back, and how many bytes each id stands for."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re

import numpy as np
from absl import logging
from jaxtyping import Int32

from moe_jax.errors import ConfigError, choose

# The special token that starts a document, where a tokenizer.json has one of these; else a new id is appended.
_BOUNDARIES = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>", "</s>", "<eos>")
_PROBE = "  two  spaces,\n\ttab \u00e9\u00df\u4e16 \ufb01 \U0001f600\n"


class Tokenizer:
  """What every tokenizer has.

  Attributes:
    size: ids are in `[0, size)`; the number of rows of an embedding.
    boundary: the one special id that starts every document; `encode` never returns it.
    byte_lengths: int32 [size], the bytes each id stands for; 0 for special ids.
    fingerprint: names the mapping from text to ids; part of the key of tokenised files.
  """

  size: int
  boundary: int
  byte_lengths: Int32[np.ndarray, " size"]
  fingerprint: str

  def encode(self, text: bytes) -> Int32[np.ndarray, " n"]:
    """The ids of `text`, int32 [n], without boundary. Any bytes are accepted."""
    raise NotImplementedError

  def decode(self, ids) -> bytes:
    """The bytes that `ids` stand for; special and unused ids stand for none."""
    raise NotImplementedError


class Bytes(Tokenizer):
  """Ids 0..255 are the bytes, 256 is the boundary; 257..263 do not occur and make the size a multiple of 8."""

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


class SentencePiece(Tokenizer):
  """A SentencePiece model as it was trained. Bytes that are not UTF-8 become U+FFFD.

  The boundary is the model's begin-of-sentence id, else its end-of-sentence id, else a new last id. A model is lossless
  when trained with `normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
  allow_whitespace_only_pieces=True, byte_fallback=True, user_defined_symbols=["\\n"]`.
  """

  def __init__(self, path: str):
    import sentencepiece
    content = _read(path, "sentencepiece")
    if content.lstrip()[:1] == b"{" and _is_json(content):
      raise ConfigError("data.tokenizer", f"sentencepiece:{path}", f"is a JSON file; write hf:{path}")
    self._model = sentencepiece.SentencePieceProcessor()
    try:
      self._model.LoadFromSerializedProto(content)
      size = self._model.GetPieceSize()
    except Exception as error:  # the binding raises RuntimeError, TypeError or what protobuf raises
      size = 0
      logging.debug("sentencepiece: %s", error)
    if not size:
      raise ConfigError("data.tokenizer", f"sentencepiece:{path}", "is not a SentencePiece model (the binary .model "
                        "file that spm_train writes)")
    self._pieces = size
    lengths = [self._length(i) for i in range(size)]
    boundary = next((i for i in (self._model.bos_id(), self._model.eos_id()) if i >= 0), None)
    _finish(self, lengths, boundary, hashlib.sha256(content).hexdigest(), f"sentencepiece:{path}")

  def _length(self, i: int) -> int:
    if self._model.IsControl(i) or self._model.IsUnused(i) or self._model.IsUnknown(i):
      return 0
    if self._model.IsByte(i):
      return 1
    return len(self._model.IdToPiece(i).replace("\u2581", " ").encode())

  def encode(self, text: bytes) -> Int32[np.ndarray, " n"]:
    return np.asarray(self._model.EncodeAsIds(text.decode("utf-8", "replace")), np.int32)

  def decode(self, ids) -> bytes:
    ids = [i for i in np.asarray(ids).ravel().tolist() if 0 <= i < self._pieces and self.byte_lengths[i]]
    return self._model.DecodeIds(ids).encode("utf-8", "replace")


class HuggingFace(Tokenizer):
  """A Hugging Face `tokenizer.json`: byte-level BPE, or pieces with U+2581 for a space.

  What its post-processor adds, its truncation and its padding are left out, and special tokens written out in a text
  are read as text. Bytes that are not UTF-8 become U+FFFD.
  """

  def __init__(self, path: str):
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import tokenizers
    content, shown = _read(path, "hf"), f"hf:{path}"
    if not _is_json(content):
      raise ConfigError("data.tokenizer", shown, f"is not JSON; a SentencePiece model is sentencepiece:{path}")
    spec = json.loads(content)
    if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
      raise ConfigError("data.tokenizer", shown, "is JSON but no tokenizer.json: it has no \"model\"")
    byte_level = '"ByteLevel"' in json.dumps([spec.get("pre_tokenizer"), spec.get("decoder")])
    if not byte_level and "\u2581" not in json.dumps(spec, ensure_ascii=False):
      raise ConfigError("data.tokenizer", shown, "is neither byte-level nor made of pieces with U+2581 for a space, so "
                        "that its bytes cannot be counted")
    try:
      self._model = tokenizers.Tokenizer.from_str(
          json.dumps(spec | {"post_processor": None, "truncation": None, "padding": None}))
    except Exception as error:  # the binding raises bare Exception
      raise ConfigError("data.tokenizer", shown, f"is not a tokenizer.json that this version reads: {error}") from error
    self._model.encode_special_tokens = True
    vocabulary, added = self._model.get_vocab(), self._model.get_added_tokens_decoder()
    lengths = [0] * (max(vocabulary.values()) + 1)
    for piece, i in vocabulary.items():
      if i not in added:
        lengths[i] = len(piece) if byte_level else _piece_length(piece)
      elif not added[i].special:
        lengths[i] = len(piece.encode())
    special = {token.content: i for i, token in added.items() if token.special}
    boundary = next((special[name] for name in _BOUNDARIES if name in special), None)
    _finish(self, lengths, boundary, hashlib.sha256(content).hexdigest(), shown)

  def encode(self, text: bytes) -> Int32[np.ndarray, " n"]:
    return np.asarray(self._model.encode(text.decode("utf-8", "replace"), add_special_tokens=False).ids, np.int32)

  def decode(self, ids) -> bytes:
    ids = [i for i in np.asarray(ids).ravel().tolist() if 0 <= i < self.size and self.byte_lengths[i]]
    return self._model.decode(ids, skip_special_tokens=False).encode("utf-8", "replace")


TOKENIZERS = {"bytes": Bytes, "sentencepiece": SentencePiece, "hf": HuggingFace}


def make_tokenizer(spec: str) -> Tokenizer:
  """`bytes`, `sentencepiece:FILE` or `hf:FILE` -> a tokenizer.

  Raises:
    ConfigError: unknown kind, missing file, or a file of another kind.
  """
  kind, colon, path = spec.partition(":")
  build = choose("data.tokenizer", kind, TOKENIZERS, shown=spec)
  if build is Bytes:
    if colon:
      raise ConfigError("data.tokenizer", spec, "the byte tokenizer takes no file; write bytes")
    return Bytes()
  if not path:
    raise ConfigError("data.tokenizer", spec, f"names no file; write {kind}:FILE")
  return build(path)


def _read(path: str, kind: str) -> bytes:
  file = pathlib.Path(path).expanduser()
  if not file.is_file():
    what = "is a folder; name the file" if file.is_dir() else "there is no such file"
    raise ConfigError("data.tokenizer", f"{kind}:{path}", what)
  content = file.read_bytes()
  if not content:
    raise ConfigError("data.tokenizer", f"{kind}:{path}", "the file is empty")
  return content


def _is_json(content: bytes) -> bool:
  try:
    json.loads(content)
  except ValueError:  # covers bytes that are not UTF-8
    return False
  return True


def _piece_length(piece: str) -> int:
  return 1 if re.fullmatch(r"<0x[0-9A-F]{2}>", piece) else len(piece.replace("\u2581", " ").encode())


def _finish(tokenizer: Tokenizer, lengths: list[int], boundary: int | None, digest: str, shown: str) -> None:
  """Sets size, boundary, byte_lengths and fingerprint; warns of a tokenizer that does not give the text back."""
  if boundary is None:
    boundary = len(lengths)
    lengths = lengths + [0] * (8 - boundary % 8)  # the boundary, and ids that do not occur up to a multiple of 8
  tokenizer.size, tokenizer.boundary = len(lengths), boundary
  tokenizer.byte_lengths = np.asarray(lengths, np.int32)
  tokenizer.byte_lengths[boundary] = 0
  tokenizer.fingerprint = digest
  probe = _PROBE.encode()
  ids = tokenizer.encode(probe)
  if tokenizer.decode(ids) != probe or tokenizer.byte_lengths[ids].sum() != len(probe):
    logging.warning("%s changes text (normalisation, spaces, unknown characters): bits per byte will be per byte of "
                    "the text that its tokens stand for", shown)
