"""Sources on disk: `text:` (files, folders, globs) and `jsonl:` (one JSON object per line)."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np

from moe_jax.data.documents import Subset, split
from moe_jax.data.options import DataOptions
from moe_jax.errors import ConfigError

_PIECE = 2**16  # bytes; a longer text file is split into several documents


def text(name: str, data: DataOptions) -> tuple[str, dict[str, Subset]]:
  """Opens the source `text:FILE`, `text:FOLDER` or `text:GLOB`.

  A folder stands for all files in it, recursively. Hidden files and folders are skipped. Files are
  ordered by path. A file of at most 64 KiB is one document. A longer file is split into documents
  of at most 64 KiB, after the end of a line if possible. The key of a document consists of the byte
  at which it starts and its path, relative to the folder or to the part of the glob before the
  first wildcard.

  Args:
    name: The source as `data.sources` names it.
    data: The options of the data.

  Returns:
    The fingerprint of the text, and its splits.

  Raises:
    ConfigError: If there are no files, or if all of them are empty.
  """
  return _open(name, data, _pieces, lambda content, where: content)


def jsonl(name: str, data: DataOptions) -> tuple[str, dict[str, Subset]]:
  """Opens the source `jsonl:FILE`, `jsonl:FOLDER` or `jsonl:GLOB`.

  Each line is a JSON object, whose string `data.text_field` is a document.

  Args:
    name: The source as `data.sources` names it.
    data: The options of the data.

  Returns:
    The fingerprint of the text, and its splits.

  Raises:
    ConfigError: If there are no files, if all of them are empty, or if a line does not contain that
      string. The latter is noticed only when that document is read.
  """

  def parse(content: bytes, where: str) -> bytes:
    try:
      record = json.loads(content)
    except RecursionError as error:
      raise ConfigError("data.sources", name, f"{where}: this line is nested too deeply") from error
    except ValueError as error:
      raise ConfigError(
        "data.sources", name, f"{where}: this line is not JSON ({error})"
      ) from error
    document = record.get(data.text_field) if isinstance(record, dict) else None
    if not isinstance(document, str):
      raise ConfigError(
        "data.text_field", data.text_field, f"{where}: {_lacking(record, data.text_field)}"
      )
    return document.encode("utf-8", "surrogatepass")

  fingerprint, splits = _open(name, data, _lines, parse)
  # Reads a document, so that a wrong field is reported now and not in the middle of training. There
  # are none for training if all documents are held out.
  next(part for part in splits.values() if len(part))[0]
  return hashlib.sha256(f"{data.text_field}:{fingerprint}".encode()).hexdigest(), splits


def _lacking(record: object, field: str) -> str:
  """Describes what a line contains in place of the string `field`, and how to fix it."""
  if not isinstance(record, dict):
    return (
      f'this line is {_kind(record)} and not an object; each line must be like {{"text": "..."}}'
    )
  if field in record:
    return (
      f"in this line it is {_kind(record[field])} and not a string; take the line out, "
      "or name another field"
    )
  strings = [key for key, value in record.items() if isinstance(value, str)]
  names = ", ".join(list(record)[:8]) or "no field at all"
  hint = (
    f"; name its field with --config.data.text_field={strings[0]}"
    if strings
    else ", none of which is a string"
  )
  return f"this line has no such field; it has {names}{hint if record else ''}"


def _kind(value: object) -> str:
  """Returns the name of the type of a JSON value, with its article."""
  names = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "an array",
    dict: "an object",
  }
  return names[type(value)]


class _Stretches:
  """Documents that are stretches of files and are read when they are asked for.

  The files must not change while this object is used.

  Args:
    name: The name of the source, for messages.
    root: The folder relative to which keys are given.
    paths: The files.
    digests: The SHA-256 digest of each file.
    stamps: The stamp of each file; see `_stamp`.
    table: [N, 3] The number of the file and the start and end in bytes of each document.
    parse: Maps the bytes of a stretch, and a description of where they are, to the document.
  """

  def __init__(
    self,
    name: str,
    root: pathlib.Path,
    paths: list[pathlib.Path],
    digests: list[bytes],
    stamps: list[tuple[int, int]],
    table: np.ndarray,
    parse,
  ):
    self._name, self._root, self._paths, self._digests, self._stamps = (
      name,
      root,
      paths,
      digests,
      stamps,
    )
    self._table, self._parse = table, parse

  def __len__(self) -> int:
    return len(self._table)

  def __getitem__(self, i: int) -> bytes:
    """Reads document `i`; raises ConfigError if its file has been removed or changed."""
    number, start, end = self._table[i].tolist()
    path = self._paths[number]
    with _readable(self._name, path), path.open("rb") as file:
      if _stamp(file) != self._stamps[number]:
        self._stamps[number] = self._verified_stamp(number, file)
      file.seek(start)
      content = file.read(end - start)
    return self._parse(content, f"{path} at byte {start}")

  def _verified_stamp(self, number: int, file: io.BufferedReader) -> tuple[int, int]:
    """Returns the new stamp of a file whose stamp has changed but whose content has not.

    A file may have been touched or copied over itself. Its content is hashed only once after that.
    """
    stamp = _stamp(file)
    if (
      hashlib.file_digest(file, "sha256").digest() != self._digests[number] or _stamp(file) != stamp
    ):
      raise ConfigError(
        "data.sources",
        self._name,
        f"{self._paths[number]} has changed since this run read it first; "
        "put the old file back, or begin a new run in another --workdir",
      )
    return stamp

  def key(self, i: int) -> str:
    """Returns the relative path of the file and the byte at which document `i` starts."""
    number, start, _ = self._table[i].tolist()
    return f"{self._paths[number].relative_to(self._root).as_posix()}:{start}"


def _open(
  name: str,
  data: DataOptions,
  cut: Callable[[BinaryIO], Iterator[tuple[int, int]]],
  parse: Callable[[bytes, str], bytes],
) -> tuple[str, dict[str, Subset]]:
  """Returns the fingerprint and the splits of a source.

  Args:
    name: The source as `data.sources` names it.
    data: The options of the data.
    cut: Yields the (start, end) of each document of an open file, in bytes.
    parse: See `_Stretches`.
  """
  root, paths = _files(name)
  digest, tables, digests, stamps = hashlib.sha256(), [np.zeros((0, 3), np.int64)], [], []
  for number, path in enumerate(paths):
    # The file is read and not mapped, because a mapped file that is truncated meanwhile would kill
    # the process.
    with _readable(name, path), path.open("rb") as file:
      stamps.append(_stamp(file))
      digests.append(hashlib.file_digest(file, "sha256").digest())
      file.seek(0)
      stretches = np.fromiter((x for stretch in cut(file) for x in stretch), np.int64).reshape(
        -1, 2
      )
      # The digest and the stretches must belong to the same content.
      if _stamp(file) != stamps[-1]:
        raise ConfigError(
          "data.sources",
          name,
          f"{path} changed while it was read; run the same command again when nothing writes to it",
        )
    # Empty files do not change the fingerprint, because they contain no document.
    if stamps[-1][0]:
      digest.update(
        path.relative_to(root).as_posix().encode("utf-8", "surrogateescape") + b"\0" + digests[-1]
      )
    tables.append(np.insert(stretches, 0, number, axis=1))
  table = np.concatenate(tables)
  if not len(table):
    raise ConfigError(
      "data.sources",
      name,
      "the file is empty" if len(paths) == 1 else f"all its {len(paths)} files are empty",
    )
  documents = _Stretches(name, root, paths, digests, stamps, table, parse)
  return digest.hexdigest(), split(name, documents, data.validation_fraction)


def _stamp(file: BinaryIO) -> tuple[int, int]:
  """Returns the size in bytes and the time of the last write in ns of an open file.

  Comparing them is a cheap way to notice that a file has changed.
  """
  stat = os.fstat(file.fileno())
  return stat.st_size, stat.st_mtime_ns


@contextlib.contextmanager
def _readable(name: str, path: pathlib.Path) -> Iterator[None]:
  """Turns errors of the file system into a ConfigError that names the file."""
  try:
    yield
  except FileNotFoundError as error:
    raise ConfigError(
      "data.sources", name, f"{path} is no longer there; put it back and run the same command again"
    ) from error
  except OSError as error:
    reason = (error.strerror or str(error)).lower()
    raise ConfigError("data.sources", name, f"{path} cannot be read: {reason}") from error


def _pieces(file: BinaryIO) -> Iterator[tuple[int, int]]:
  """Yields the (start, end) of the documents of a text file."""
  start, piece = 0, b""
  while True:
    # One byte more than a piece is read, to see whether a cut there is between two characters.
    piece += file.read(_PIECE + 1 - len(piece))
    if len(piece) <= _PIECE:
      break
    cut = piece.rfind(b"\n", 0, _PIECE) + 1
    if not cut:
      # The piece has no line end. Move the cut back to a boundary between two UTF-8 characters:
      # bytes 10xxxxxx continue a character, of which there are at most three in a row.
      cut = _PIECE
      while cut > _PIECE - 4 and piece[cut] & 0xC0 == 0x80:
        cut -= 1
    yield start, start + cut
    start, piece = start + cut, piece[cut:]
  if piece:
    yield start, start + len(piece)


def _lines(file: BinaryIO) -> Iterator[tuple[int, int]]:
  """Yields the (start, end) of the lines of a file that are not blank."""
  start = 0
  for line in file:
    if line.strip():
      yield start, start + len(line)
    start += len(line)


def _files(name: str) -> tuple[pathlib.Path, list[pathlib.Path]]:
  """Returns the folder relative to which keys are given, and the sorted files of the source.

  Raises:
    ConfigError: If there are no such files, or if the path cannot be searched.
  """
  try:
    return _search(name)
  # These are raised for a name that is too long, for the home of an unknown user, and for a
  # malformed pattern.
  except (OSError, RuntimeError, ValueError) as error:
    # ConfigError is a ValueError.
    if isinstance(error, ConfigError):
      raise
    raise ConfigError("data.sources", name, f"cannot be searched ({error})") from error


def _search(name: str) -> tuple[pathlib.Path, list[pathlib.Path]]:
  """Does the work of `_files`, whose docstring applies."""
  pattern = pathlib.Path(name.partition(":")[2]).expanduser()
  if pattern.is_file():
    return pattern.parent, [pattern]
  if pattern.is_dir():
    root, matches = pattern, pattern.rglob("*")
  else:
    parts = pattern.parts
    # The number of leading parts of the path without wildcards.
    num_fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), None)
    if num_fixed is None:
      raise ConfigError(
        "data.sources", name, f"there is no such file or folder (from {pathlib.Path.cwd()})"
      )
    root = pathlib.Path(*parts[:num_fixed])
    matches = (pathlib.Path(path) for path in glob.glob(str(pattern), recursive=True))
  paths = [
    p
    for p in matches
    if p.is_file() and not any(part.startswith(".") for part in p.relative_to(root).parts)
  ]
  if not paths:
    raise ConfigError(
      "data.sources", name, "this folder has no files" if pattern.is_dir() else "no file matches"
    )
  return root, sorted(paths, key=lambda p: p.relative_to(root).as_posix())
