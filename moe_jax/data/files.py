"""Sources on disk: `text:` (files, folders, globs) and `jsonl:` (one JSON object a line)."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np

from moe_jax.data.documents import Subset, split
from moe_jax.errors import ConfigError

_PIECE = 2**16  # bytes; a longer text file is several documents


def text(name: str, data) -> tuple[str, dict[str, Subset]]:
  """Source `text:FILE`, `text:FOLDER` (all its files, recursively, but no hidden ones) or
  `text:GLOB`.

  A file is a document; one over 64 KiB is several, each of at most 64 KiB and cut after a line end
  where there is one. Files are ordered by path. A document's key is its path, below the folder or
  the part of the glob before its first wildcard, and the byte at which it starts.

  Raises:
    ConfigError: nothing there, or nothing in it.
  """
  return _open(name, data, _pieces, lambda content, where: content)


def jsonl(name: str, data) -> tuple[str, dict[str, Subset]]:
  """Source `jsonl:FILE`, `jsonl:FOLDER` or `jsonl:GLOB`: the string `data.text_field` of each line
  is a document.

  Raises:
    ConfigError: nothing there, nothing in it, or (when that line is read) a line without that
      string.
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
    found = record.get(data.text_field) if isinstance(record, dict) else None
    if not isinstance(found, str):
      raise ConfigError(
        "data.text_field", data.text_field, f"{where}: {_lacking(record, data.text_field)}"
      )
    return found.encode("utf-8", "surrogatepass")

  fingerprint, splits = _open(name, data, _lines, parse)
  splits["train"][0]  # a wrong field is told now and not in the middle of training
  return hashlib.sha256(f"{data.text_field}:{fingerprint}".encode()).hexdigest(), splits


def _lacking(record: object, field: str) -> str:
  """What a line has in place of the string `field`, and what to do."""
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
  there = ", ".join(list(record)[:8]) or "no field at all"
  hint = (
    f"; name its field with --config.data.text_field={strings[0]}"
    if strings
    else ", none of which is a string"
  )
  return f"this line has no such field; it has {there}{hint if record else ''}"


def _kind(value: object) -> str:
  """As JSON calls it."""
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
  """Documents that are stretches of files, read when asked for; the files must stay what they
  were."""

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
    """Raises ConfigError if the file is gone, or another than the one whose fingerprint was
    taken."""
    number, start, end = self._table[i].tolist()
    path = self._paths[number]
    with _readable(self._name, path), path.open("rb") as file:
      if _stamp(file) != self._stamps[number]:
        self._stamps[number] = self._compared(number, file)
      file.seek(start)
      content = file.read(end - start)
    return self._parse(content, f"{path} at byte {start}")

  def _compared(self, number: int, file: BinaryIO) -> tuple[int, int]:
    """The new stamp of a file that was only touched or copied over itself; its content is compared
    once."""
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
    path, start, _ = self._table[i].tolist()
    return f"{self._paths[path].relative_to(self._root).as_posix()}:{start}"


def _open(
  name: str,
  data,
  cut: Callable[[BinaryIO], Iterator[tuple[int, int]]],
  parse: Callable[[bytes, str], bytes],
) -> tuple[str, dict[str, Subset]]:
  """Fingerprint and splits of the stretches that `cut(file)` yields as (start, end) for each
  file."""
  root, paths = _files(name)
  digest, tables, digests, stamps = hashlib.sha256(), [np.zeros((0, 3), np.int64)], [], []
  for number, path in enumerate(paths):
    # Read and not mapped: a mapped file that somebody cuts meanwhile would kill the process.
    with _readable(name, path), path.open("rb") as file:
      stamps.append(_stamp(file))
      digests.append(hashlib.file_digest(file, "sha256").digest())
      file.seek(0)
      stretches = np.fromiter((x for stretch in cut(file) for x in stretch), np.int64).reshape(
        -1, 2
      )
      if _stamp(file) != stamps[-1]:
        raise ConfigError(
          "data.sources",
          name,
          f"{path} changed while it was read; run the same command again when nothing writes to it",
        )
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
  """Bytes, and time of the last write in ns: what tells cheaply that a file has changed."""
  known = os.fstat(file.fileno())
  return known.st_size, known.st_mtime_ns


@contextlib.contextmanager
def _readable(name: str, path: pathlib.Path) -> Iterator[None]:
  """Errors of the file system in one sentence that names the file."""
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
  start, piece = 0, b""
  while True:
    # One byte more than a piece, to see whether a cut is between two characters.
    piece += file.read(_PIECE + 1 - len(piece))
    if len(piece) <= _PIECE:
      break
    cut = piece.rfind(b"\n", 0, _PIECE) + 1
    if not cut:  # no line end: between two UTF-8 characters
      cut = _PIECE
      while cut > _PIECE - 4 and piece[cut] & 0xC0 == 0x80:
        cut -= 1
    yield start, start + cut
    start, piece = start + cut, piece[cut:]
  if piece:
    yield start, start + len(piece)


def _lines(file: BinaryIO) -> Iterator[tuple[int, int]]:
  start = 0
  for line in file:
    if line.strip():
      yield start, start + len(line)
    start += len(line)


def _files(name: str) -> tuple[pathlib.Path, list[pathlib.Path]]:
  """The folder below which keys are told, and the files in order."""
  try:
    return _found(name)
  except (
    OSError,
    RuntimeError,
    ValueError,
  ) as error:  # too long a name, an unknown user's home, a pattern's error
    if isinstance(error, ConfigError):
      raise
    raise ConfigError("data.sources", name, f"cannot be looked for ({error})") from error


def _found(name: str) -> tuple[pathlib.Path, list[pathlib.Path]]:
  given = pathlib.Path(name.partition(":")[2]).expanduser()
  if given.is_file():
    return given.parent, [given]
  if given.is_dir():
    root, found = given, given.rglob("*")
  else:
    parts = given.parts
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), None)
    if fixed is None:
      raise ConfigError(
        "data.sources", name, f"there is no such file or folder (from {pathlib.Path.cwd()})"
      )
    root = pathlib.Path(*parts[:fixed])
    found = (pathlib.Path(path) for path in glob.glob(str(given), recursive=True))
  paths = [
    p
    for p in found
    if p.is_file() and not any(part.startswith(".") for part in p.relative_to(root).parts)
  ]
  if not paths:
    raise ConfigError(
      "data.sources", name, "this folder has no files" if given.is_dir() else "no file matches"
    )
  return root, sorted(paths, key=lambda p: p.relative_to(root).as_posix())
