"""Tokenizers that are read from files: SentencePiece models and Hugging Face's tokenizer.json."""

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

# A text that tests whether a tokenizer gives back the text unchanged: see `_finish`.
_PROBE = "  two  spaces,\n\ttab \u00e9\u00df\u4e16 \ufb01 \U0001f600\n"
# The embedding has one row for each id, whether or not the id is used. Unused ids are fine, because
# pruned vocabularies keep their old ids. But no published vocabulary has more ids than this, and a
# damaged file that contains the id 2^31 must not lead to an allocation of 8 GB.
_MOST_IDS = 2**20


class SentencePiece(Tokenizer):
  r"""A SentencePiece model, used as it was trained.

  Bytes that are not UTF-8 become U+FFFD. The boundary is the model's begin-of-sentence id or, if it
  has none, its end-of-sentence id. If it has neither, the boundary is a new id after all others.

  A model is lossless if it is trained with `normalization_rule_name="identity",
  remove_extra_whitespaces=False, add_dummy_prefix=False, allow_whitespace_only_pieces=True,
  byte_fallback=True, user_defined_symbols=["\n"]`.

  Args:
    path: The path of the .model file.
    bos: The name of the token that starts every document. "" means the boundary described above.
    eos: The name of the token that ends every document. "" means that there is none.

  Raises:
    ConfigError: If the file cannot be read or is not a SentencePiece model, or if `bos` or `eos`
      cannot mark documents.
  """

  def __init__(self, path: str, bos: str = "", eos: str = ""):
    import sentencepiece

    content, self.shown = _read(path, "sentencepiece"), f"sentencepiece:{path}"
    if content.lstrip()[:1] == b"{" and _is_json(content):
      raise ConfigError("data.tokenizer", self.shown, f"is a JSON file; write hf:{path}")
    not_a_model = "is not a SentencePiece model (the binary .model file that spm_train writes)"
    self._model = sentencepiece.SentencePieceProcessor()
    with _quiet(), _config_errors(self.shown, not_a_model):
      self._model.LoadFromSerializedProto(content)
    with _config_errors(self.shown, "is a damaged SentencePiece model, copy it again"):
      pieces = [self._model.IdToPiece(i) for i in range(self._model.GetPieceSize())]
      lengths = [self._length(i, piece) for i, piece in enumerate(pieces)]
      default = next(
        (i for i in (self._model.bos_id(), self._model.eos_id()) if 0 <= i < len(pieces)), None
      )
      special = {piece: i for i, piece in enumerate(pieces) if self._model.IsControl(i)}
    if not pieces:
      raise ConfigError("data.tokenizer", self.shown, not_a_model)
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
    """Returns the number of bytes that id `i` stands for."""
    if self._model.IsControl(i) or self._model.IsUnused(i) or self._model.IsUnknown(i):
      return 0
    if self._model.IsByte(i):
      return 1
    return len(piece.replace("\u2581", " ").encode())

  def encode(self, text: bytes) -> Int32[np.ndarray, " n"]:
    """Returns the ids of `text`; see the base class."""
    with _config_errors(self.shown, "cannot encode a text"):
      return np.asarray(self._model.EncodeAsIds(text.decode("utf-8", "replace")), np.int32)

  def decode(self, ids) -> bytes:
    """Returns the bytes that `ids` stand for; see the base class."""
    ids = [
      i for i in np.asarray(ids).ravel().tolist() if 0 <= i < self._pieces and self.byte_lengths[i]
    ]
    return self._model.DecodeIds(ids).encode("utf-8", "replace")


class HuggingFace(Tokenizer):
  """A Hugging Face `tokenizer.json` with byte-level BPE or with pieces that write spaces as U+2581.

  The post-processor, truncation and padding of the file are ignored. Special tokens that are
  spelled out in a text are read as text. Bytes that are not UTF-8 become U+FFFD. The model's
  unknown token stands for 0 bytes, as in SentencePiece, whether or not the file declares it
  special.

  Args:
    path: The path of the file.
    bos: The name of the token that starts every document. "" means the token that
      `known_boundary` finds, or else a new id.
    eos: The name of the token that ends every document. "" means that there is none.

  Raises:
    ConfigError: If the file cannot be read or is not a usable tokenizer.json, or if `bos` or `eos`
      cannot mark documents.
  """

  def __init__(self, path: str, bos: str = "", eos: str = ""):
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import tokenizers

    content, self.shown = _read(path, "hf"), f"hf:{path}"
    spec, byte_level = _spec(content, self.shown, path)
    with _quiet(), _config_errors(self.shown, "is not a tokenizer.json that this version reads"):
      # A token that marks documents is made special even if the file does not declare it so. Then
      # a text that spells it out is read as text.
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
    """Returns the ids of `text`; see the base class."""
    with _config_errors(self.shown, "cannot encode a text"):
      return np.asarray(
        self._model.encode(text.decode("utf-8", "replace"), add_special_tokens=False).ids, np.int32
      )

  def decode(self, ids) -> bytes:
    """Returns the bytes that `ids` stand for; see the base class."""
    ids = [
      i for i in np.asarray(ids).ravel().tolist() if 0 <= i < self.size and self.byte_lengths[i]
    ]
    return self._model.decode(ids, skip_special_tokens=False).encode("utf-8", "replace")


def _spec(content: bytes, shown: str, path: str) -> tuple[dict[str, Any], bool]:
  """Returns the parsed tokenizer.json, and whether each character of a piece is one byte."""
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
  """Raises ConfigError if no embedding can have a row for each id.

  This is the case if the vocabulary is empty, if two tokens have the same id, or if an id is so
  high that the embedding would not fit into memory.
  """
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
  """Makes `model` read special tokens as text if a text spells them out.

  `encode_special_tokens` alone does not achieve this if the token is also an entry of the model's
  own vocabulary, because Unigram and word models use any entry that occurs in the text. So a
  pre-tokenizer is added that cuts such a name after its first character.
  """
  import tokenizers
  from tokenizers import pre_tokenizers

  def ids(name):
    return model.encode(name, add_special_tokens=False).ids

  names = [name for name, i in special.items() if len(name) > 1 and i in ids(name)]
  if not names:
    return
  pattern = "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names)
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
  """Returns the number of bytes that each id stands for.

  Special tokens, the unknown token and unused ids stand for 0 bytes.

  Args:
    model: The part "model" of a tokenizer.json.
    vocabulary: Token -> id, including the tokens in `added`.
    added: Id -> tokenizers.AddedToken.
    byte_level: Whether each character of a piece is one byte.
  """
  lengths = [0] * (max(vocabulary.values()) + 1)
  # WordPiece and some BPE files mark the pieces that are inside a word or at its end. The marks
  # themselves stand for no bytes.
  prefix, suffix = (
    model.get(key) or "" for key in ("continuing_subword_prefix", "end_of_word_suffix")
  )
  for piece, i in vocabulary.items():
    if i in added:
      lengths[i] = 0 if added[i].special else len(piece.encode())
    else:
      bare = piece.removeprefix(prefix).removesuffix(suffix)
      lengths[i] = len(bare) if byte_level else _piece_length(bare)
  # Unigram models name the unknown token by its id, and the other models by its text.
  for unknown in (model.get("unk_id"), vocabulary.get(model.get("unk_token") or "")):
    if unknown is not None and unknown < len(lengths):
      lengths[unknown] = 0
  return lengths


def _piece_length(piece: str) -> int:
  """Returns the number of bytes of a piece that is not byte-level; "<0x0A>" stands for one byte."""
  return (
    1 if re.fullmatch(r"<0x[0-9A-F]{2}>", piece) else len(piece.replace("\u2581", " ").encode())
  )


def _read(path: str, kind: str) -> bytes:
  """Returns the content of a file, or raises ConfigError if it cannot be read or is empty."""
  shown = f"{kind}:{path}"
  try:
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
      raise ConfigError(
        "data.tokenizer",
        shown,
        "is a folder; name the file"
        if file.is_dir()
        else f"there is no such file (from {pathlib.Path.cwd()}); docs/tutorials/c4_from_zero.md "
        "shows how to make one, and --config.data.tokenizer=bytes needs none",
      )
    content = file.read_bytes()
  # RuntimeError is raised for the home of an unknown user.
  except (OSError, RuntimeError) as error:
    raise ConfigError("data.tokenizer", shown, f"cannot be read ({error})") from error
  if not content:
    raise ConfigError("data.tokenizer", shown, "the file is empty")
  return content


def _is_json(content: bytes) -> bool:
  """Returns whether `content` is JSON, even if it is nested too deeply for the parser."""
  try:
    json.loads(content)
  except RecursionError:  # Deeply nested brackets are JSON.
    return True
  except ValueError:  # UnicodeDecodeError is a ValueError, too.
    return False
  return True


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Discards what a library writes to standard error, such as the trace of a Rust panic.

  `_config_errors` reports the error instead.
  """
  with contextlib.ExitStack() as stack:
    with contextlib.suppress(OSError):  # A process may have no standard error.
      saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
      stack.callback(os.close, saved)
      stack.callback(os.dup2, saved, 2)
      os.dup2(null, 2)
      os.close(null)
    yield


@contextlib.contextmanager
def _config_errors(shown: str, what: str) -> Iterator[None]:
  """Turns the errors of a native library into a ConfigError.

  These libraries raise bare Exception, UnicodeDecodeError, or Rust panics.
  """
  try:
    yield
  except ConfigError:
    raise
  except BaseException as error:
    # A panic is not an Exception, so that it is not caught by mistake. Other exceptions that are
    # not an Exception, such as Ctrl-C, are raised again.
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
      raise
    text = " ".join(str(error).split())[:200]
    raise ConfigError("data.tokenizer", shown, f"{what}: {text or type(error).__name__}") from error


def _finish(
  tokenizer: Tokenizer,
  lengths: list[int],
  default: int | None,
  content: bytes,
  vocabulary: Mapping[str, int],
  special: Mapping[str, int],
  named: tuple[str, str],
) -> None:
  """Sets the size, boundary, eos, byte_lengths and fingerprint of a tokenizer.

  Prints a note if decoding does not give back the text.

  Args:
    tokenizer: The tokenizer, which can encode and decode already.
    lengths: The number of bytes that each id stands for.
    default: The boundary if `data.bos` is empty. None means a new id.
    content: The content of the file.
    vocabulary: See `named_id`.
    special: See `named_id`.
    named: `data.bos` and `data.eos`.

  Raises:
    ConfigError: If `data.bos` or `data.eos` cannot mark documents, or if they are the same token.
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
    # Appends the boundary, and unused ids up to a multiple of 8.
    lengths = lengths + [0] * (8 - boundary % 8)
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
  # The fingerprint is that of the file alone unless `data.bos` or `data.eos` make a difference.
  if ids and (boundary != default or tokenizer.eos is not None):
    tokenizer.fingerprint += "-" + cache.key(boundary, tokenizer.eos)[:16]
  probe = _PROBE.encode()
  probe_ids = tokenizer.document(probe)[1:]
  if tokenizer.decode(probe_ids) != probe or tokenizer.byte_lengths[probe_ids].sum() != len(probe):
    tell(
      f"{tokenizer.shown} changes text (normalisation, spaces, unknown characters): bits per byte "
      "will be per byte of the text that its tokens stand for"
    )
