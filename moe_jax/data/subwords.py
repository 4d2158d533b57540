"""Tokenizers that are files: SentencePiece models and Hugging Face's tokenizer.json."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int32

from moe_jax.data import cache
from moe_jax.data.boundaries import known_boundary, named_id, tell_new_id
from moe_jax.data.notes import tell
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.errors import ConfigError

_PROBE = "  two  spaces,\n\ttab \u00e9\u00df\u4e16 \ufb01 \U0001f600\n"
# An embedding gets one row for each id, used or not. Pruned vocabularies keep their old ids, so
# holes are fine; but no published vocabulary has more ids than this, and a damaged file that names
# the id 2^31 must not ask for 8 GB.
_MOST_IDS = 2**20


class SentencePiece(Tokenizer):
  """A SentencePiece model as it was trained. Bytes that are not UTF-8 become U+FFFD.

  The boundary is the model's begin-of-sentence id, else its end-of-sentence id, else a new last id.
  A model is lossless when trained with `normalization_rule_name="identity",
  remove_extra_whitespaces=False, add_dummy_prefix=False, allow_whitespace_only_pieces=True,
  byte_fallback=True, user_defined_symbols=["\\n"]`.
  """

  def __init__(self, path: str, bos: str = "", eos: str = ""):
    import sentencepiece

    content, self.shown = _read(path, "sentencepiece"), f"sentencepiece:{path}"
    if content.lstrip()[:1] == b"{" and _is_json(content):
      raise ConfigError("data.tokenizer", self.shown, f"is a JSON file; write hf:{path}")
    wrong = "is not a SentencePiece model (the binary .model file that spm_train writes)"
    self._model = sentencepiece.SentencePieceProcessor()
    with _quiet(), _told(self.shown, wrong):
      self._model.LoadFromSerializedProto(content)
    with _told(self.shown, "is a damaged SentencePiece model, copy it again"):
      pieces = [self._model.IdToPiece(i) for i in range(self._model.GetPieceSize())]
      lengths = [self._length(i, piece) for i, piece in enumerate(pieces)]
      default = next(
        (i for i in (self._model.bos_id(), self._model.eos_id()) if 0 <= i < len(pieces)), None
      )
      special = {piece: i for i, piece in enumerate(pieces) if self._model.IsControl(i)}
    if not pieces:
      raise ConfigError("data.tokenizer", self.shown, wrong)
    self._pieces = len(pieces)
    _finish(
      self,
      lengths,
      default,
      content,
      {piece: i for i, piece in enumerate(pieces)},
      special,
      (bos, eos),
    )

  def _length(self, i: int, piece: str) -> int:
    if self._model.IsControl(i) or self._model.IsUnused(i) or self._model.IsUnknown(i):
      return 0
    if self._model.IsByte(i):
      return 1
    return len(piece.replace("\u2581", " ").encode())

  def encode(self, text: bytes) -> Int32[np.ndarray, " n"]:
    with _told(self.shown, "cannot encode a text"):
      return np.asarray(self._model.EncodeAsIds(text.decode("utf-8", "replace")), np.int32)

  def decode(self, ids) -> bytes:
    ids = [
      i for i in np.asarray(ids).ravel().tolist() if 0 <= i < self._pieces and self.byte_lengths[i]
    ]
    return self._model.DecodeIds(ids).encode("utf-8", "replace")


class HuggingFace(Tokenizer):
  """A Hugging Face `tokenizer.json`: byte-level BPE, or pieces with U+2581 for a space.

  What its post-processor adds, its truncation and its padding are left out, and special tokens
  written out in a text are read as text. Bytes that are not UTF-8 become U+FFFD. The model's
  unknown token stands for 0 bytes, as in SentencePiece, whether or not the file declares it
  special.
  """

  def __init__(self, path: str, bos: str = "", eos: str = ""):
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import tokenizers

    content, self.shown = _read(path, "hf"), f"hf:{path}"
    spec, byte_level = _spec(content, self.shown, path)
    with _quiet(), _told(self.shown, "is not a tokenizer.json that this version reads"):
      # A token that marks documents is special whatever the file says, so that text which spells it
      # is read as text.
      for token in spec.get("added_tokens") or ():
        if token["content"] and token["content"] in (bos, eos):
          token["special"] = True
      self._model = tokenizers.Tokenizer.from_str(
        json.dumps(spec | {"post_processor": None, "truncation": None, "padding": None})
      )
      self._model.encode_special_tokens = True
      vocabulary, added = self._model.get_vocab(), self._model.get_added_tokens_decoder()
      _check_ids(vocabulary, self.shown)
      special = {token.content: i for i, token in sorted(added.items()) if token.special}
      _spell_out(self._model, special)
      lengths = _lengths(spec["model"], vocabulary, added, byte_level)
    _finish(self, lengths, known_boundary(special), content, vocabulary, special, (bos, eos))

  def encode(self, text: bytes) -> Int32[np.ndarray, " n"]:
    with _told(self.shown, "cannot encode a text"):
      return np.asarray(
        self._model.encode(text.decode("utf-8", "replace"), add_special_tokens=False).ids, np.int32
      )

  def decode(self, ids) -> bytes:
    ids = [
      i for i in np.asarray(ids).ravel().tolist() if 0 <= i < self.size and self.byte_lengths[i]
    ]
    return self._model.decode(ids, skip_special_tokens=False).encode("utf-8", "replace")


def _spec(content: bytes, shown: str, path: str) -> tuple[dict[str, Any], bool]:
  """The parsed tokenizer.json, and whether its tokens are written byte by byte."""
  if not _is_json(content):
    raise ConfigError(
      "data.tokenizer", shown, f"is not JSON; a SentencePiece model is sentencepiece:{path}"
    )
  try:
    spec = json.loads(content)
    text = json.dumps(spec, ensure_ascii=False)
  except RecursionError as error:
    raise ConfigError(
      "data.tokenizer", shown, "is JSON but no tokenizer.json: it is nested too deeply"
    ) from error
  if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
    raise ConfigError("data.tokenizer", shown, 'is JSON but no tokenizer.json: it has no "model"')
  byte_level = '"ByteLevel"' in json.dumps([spec.get("pre_tokenizer"), spec.get("decoder")])
  if not byte_level and "\u2581" not in text:
    raise ConfigError(
      "data.tokenizer",
      shown,
      "is neither byte-level nor made of pieces with U+2581 for a space, so "
      "that its bytes cannot be counted",
    )
  return spec, byte_level


def _check_ids(vocabulary: Mapping[str, int], shown: str) -> None:
  """Refuses vocabularies that no embedding can have: none at all, two tokens on one row, rows
  beyond any memory."""
  if not vocabulary:
    raise ConfigError(
      "data.tokenizer", shown, "its vocabulary is empty; give the file of a trained tokenizer"
    )
  most = max(_MOST_IDS, 2 * len(vocabulary))
  token = max(vocabulary, key=vocabulary.__getitem__)
  if vocabulary[token] >= most:
    raise ConfigError(
      "data.tokenizer",
      shown,
      f"gives the token {token!r} the id {vocabulary[token]}, but it has only "
      f"{len(vocabulary)} tokens; give a file whose ids are below {most}",
    )
  if len(set(vocabulary.values())) < len(vocabulary):
    taken: dict[int, str] = {}
    first, second = next(
      (taken[i], t) for t, i in vocabulary.items() if taken.setdefault(i, t) != t
    )
    raise ConfigError(
      "data.tokenizer",
      shown,
      f"gives the tokens {first!r} and {second!r} the same id "
      f"{vocabulary[first]}; give a file in which each has its own",
    )


def _spell_out(model, special: Mapping[str, int]) -> None:
  """Makes `model` read special tokens that a text spells out as text.

  `encode_special_tokens` alone does not do it where the token is also an entry of the model's own
  vocabulary: Unigram and word models take any entry that they find. So such a name is cut behind
  its first character.
  """
  import tokenizers
  from tokenizers import pre_tokenizers

  def ids(name):
    return model.encode(name, add_special_tokens=False).ids

  found = [name for name, i in special.items() if len(name) > 1 and i in ids(name)]
  if not found:
    return
  pattern = "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in found)
  cut = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
  model.pre_tokenizer = pre_tokenizers.Sequence(
    [*([model.pre_tokenizer] if model.pre_tokenizer else []), cut]
  )


def _lengths(
  model: Mapping[str, Any],
  vocabulary: Mapping[str, int],
  added: Mapping[int, Any],
  byte_level: bool,
) -> list[int]:
  """The bytes that each id stands for; 0 for special tokens, the unknown token and ids that do not
  occur.

  Args:
    model: the part "model" of a tokenizer.json.
    vocabulary: token -> id, those of `added` among them.
    added: id -> tokenizers.AddedToken.
    byte_level: each character of a piece is one byte.
  """
  lengths = [0] * (max(vocabulary.values()) + 1)
  # WordPiece and some BPE files mark pieces inside a word, or at its end; the marks stand for no
  # byte.
  prefix, suffix = (
    model.get(key) or "" for key in ("continuing_subword_prefix", "end_of_word_suffix")
  )
  for piece, i in vocabulary.items():
    if i in added:
      lengths[i] = 0 if added[i].special else len(piece.encode())
    else:
      bare = piece.removeprefix(prefix).removesuffix(suffix)
      lengths[i] = len(bare) if byte_level else _piece_length(bare)
  # Unigram names its unknown token by its place, the other models by its text.
  for unknown in (model.get("unk_id"), vocabulary.get(model.get("unk_token") or "")):
    if unknown is not None and unknown < len(lengths):
      lengths[unknown] = 0
  return lengths


def _piece_length(piece: str) -> int:
  return (
    1 if re.fullmatch(r"<0x[0-9A-F]{2}>", piece) else len(piece.replace("\u2581", " ").encode())
  )


def _read(path: str, kind: str) -> bytes:
  shown = f"{kind}:{path}"
  try:
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
      what = "is a folder; name the file" if file.is_dir() else "there is no such file"
      raise ConfigError("data.tokenizer", shown, what)
    content = file.read_bytes()
  except (OSError, RuntimeError) as error:  # RuntimeError: the home of an unknown user
    raise ConfigError("data.tokenizer", shown, f"cannot be read ({error})") from error
  if not content:
    raise ConfigError("data.tokenizer", shown, "the file is empty")
  return content


def _is_json(content: bytes) -> bool:
  try:
    json.loads(content)
  except RecursionError:  # only brackets nest
    return True
  except ValueError:  # covers bytes that are not UTF-8
    return False
  return True


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Drops what a library writes on standard error by itself, such as the trace of a Rust panic:
  `_told` says it."""
  with contextlib.ExitStack() as stack:
    with contextlib.suppress(OSError):  # a process may have no standard error
      saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
      stack.callback(os.close, saved)
      stack.callback(os.dup2, saved, 2)
      os.dup2(nowhere, 2)
      os.close(nowhere)
    yield


@contextlib.contextmanager
def _told(shown: str, what: str) -> Iterator[None]:
  """Errors of a binding as one sentence: it raises bare Exception, UnicodeDecodeError, or a Rust
  panic."""
  try:
    yield
  except ConfigError:
    raise
  except BaseException as error:
    # A panic is not an Exception, so that nobody catches it by mistake; Ctrl-C and exit pass.
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
      raise
    said = " ".join(str(error).split())[:200]
    raise ConfigError("data.tokenizer", shown, f"{what}: {said or type(error).__name__}") from error


def _finish(
  tokenizer: Tokenizer,
  lengths: list[int],
  default: int | None,
  content: bytes,
  vocabulary: Mapping[str, int],
  special: Mapping[str, int],
  named: tuple[str, str],
) -> None:
  """Sets size, boundary, eos, byte_lengths and fingerprint; tells of a tokenizer that does not give
  the text back.

  Args:
    lengths: bytes that each id stands for.
    default: the boundary where no name is given; None = a new id.
    content: the file's.
    vocabulary, special: see `named_id`.
    named: `data.bos` and `data.eos`.
  """

  def encode(text):
    return tokenizer.encode(text.encode()).tolist()

  ids = {
    field: named_id(field, name, vocabulary, special, encode, tokenizer.shown)
    for field, name in zip(("data.bos", "data.eos"), named, strict=True)
    if name
  }
  boundary, tokenizer.eos = ids.get("data.bos", default), ids.get("data.eos")
  if boundary is None:
    boundary = len(lengths)
    lengths = lengths + [0] * (
      8 - boundary % 8
    )  # the boundary, and ids that do not occur up to a multiple of 8
    tell_new_id(boundary, special, tokenizer.shown)
  if tokenizer.eos == boundary:
    raise ConfigError(
      "data.eos",
      named[1],
      "is the token that starts every document, and so separates them already; "
      "leave data.eos empty, or name another data.bos",
    )
  tokenizer.size, tokenizer.boundary = len(lengths), boundary
  tokenizer.byte_lengths = np.asarray(lengths, np.int32)
  tokenizer.byte_lengths[list({boundary, *ids.values()})] = 0
  tokenizer.fingerprint = hashlib.sha256(content).hexdigest()
  if ids and (boundary != default or tokenizer.eos is not None):
    tokenizer.fingerprint += "-" + cache.key(boundary, tokenizer.eos)[:16]
  probe = _PROBE.encode()
  probed = tokenizer.document(probe)[1:]
  if tokenizer.decode(probed) != probe or tokenizer.byte_lengths[probed].sum() != len(probe):
    tell(
      f"{tokenizer.shown} changes text (normalisation, spaces, unknown characters): bits per byte "
      "will be per byte of the text that its tokens stand for"
    )
