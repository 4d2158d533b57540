"""Sources on disk: `text:` (files, folders, globs) and `jsonl:` (one JSON object a line)."""

from __future__ import annotations

import glob
import hashlib
import json
import mmap
import os
import pathlib
from collections.abc import Iterator

import numpy as np

from moe_jax.data.documents import Subset, split
from moe_jax.errors import ConfigError

_PIECE = 2**16  # bytes; a longer text file is several documents


def text(name: str, data) -> tuple[str, dict[str, Subset]]:
  """Source `text:FILE`, `text:FOLDER` (all its files, recursively, but no hidden ones) or `text:GLOB`.

  A file is a document; one over 64 KiB is several, each of at most 64 KiB and cut after a line end where there is one.
  Files are ordered by path. A document's key is its path, below the folder or the part of the glob before its first
  wildcard, and the byte at which it starts.

  Raises:
    ConfigError: nothing there, or nothing in it.
  """
  return _open(name, data, _pieces, lambda content, where: content)


def jsonl(name: str, data) -> tuple[str, dict[str, Subset]]:
  """Source `jsonl:FILE`, `jsonl:FOLDER` or `jsonl:GLOB`: the string `data.text_field` of each line is a document.

  Raises:
    ConfigError: nothing there, nothing in it, or (when that line is read) a line without that string.
  """

  def parse(content: bytes, where: str) -> bytes:
    try:
      record = json.loads(content)
    except ValueError as error:
      raise ConfigError("data.sources", name, f"{where}: this line is not JSON ({error})") from error
    found = record.get(data.text_field) if isinstance(record, dict) else None
    if not isinstance(found, str):
      there = f"it has {', '.join(record)}" if isinstance(record, dict) else "it is no object"
      raise ConfigError("data.text_field", data.text_field, f"{where}: this line has no such string; {there}")
    return found.encode("utf-8", "surrogatepass")

  fingerprint, splits = _open(name, data, _lines, parse)
  splits["train"][0]  # a wrong field is told now and not in the middle of training
  return hashlib.sha256(f"{data.text_field}:{fingerprint}".encode()).hexdigest(), splits


class _Stretches:
  """Documents that are stretches of files, read when asked for."""

  def __init__(self, root: pathlib.Path, paths: list[pathlib.Path], table: np.ndarray, parse):
    self._root, self._paths, self._table, self._parse = root, paths, table, parse

  def __len__(self) -> int:
    return len(self._table)

  def __getitem__(self, i: int) -> bytes:
    path, start, end = self._table[i].tolist()
    with self._paths[path].open("rb") as file:
      file.seek(start)
      content = file.read(end - start)
    return self._parse(content, f"{self._paths[path]} at byte {start}")

  def key(self, i: int) -> str:
    path, start, _ = self._table[i].tolist()
    return f"{self._paths[path].relative_to(self._root).as_posix()}:{start}"


def _open(name: str, data, cut, parse) -> tuple[str, dict[str, Subset]]:
  """Fingerprint and splits of the stretches that `cut(content)` yields as (start, end) for each file."""
  root, paths = _files(name)
  digest, tables = hashlib.sha256(), [np.zeros((0, 3), np.int64)]
  for number, path in enumerate(paths):
    if not path.stat().st_size:
      continue
    if not os.access(path, os.R_OK):
      raise ConfigError("data.sources", name, f"{path} cannot be read: permission denied")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
      digest.update(path.relative_to(root).as_posix().encode("utf-8", "surrogateescape") + b"\0")
      digest.update(hashlib.sha256(content).digest())
      stretches = np.fromiter((x for stretch in cut(content) for x in stretch), np.int64).reshape(-1, 2)
    tables.append(np.insert(stretches, 0, number, axis=1))
  table = np.concatenate(tables)
  if not len(table):
    raise ConfigError("data.sources", name, "the file is empty" if len(paths) == 1 else
                      f"all its {len(paths)} files are empty")
  return digest.hexdigest(), split(name, _Stretches(root, paths, table, parse), data.validation_fraction)


def _pieces(content: mmap.mmap) -> Iterator[tuple[int, int]]:
  start = 0
  while len(content) - start > _PIECE:
    end = content.rfind(b"\n", start, start + _PIECE) + 1
    if not end:  # no line end: between two UTF-8 characters
      end = start + _PIECE
      while end > start + _PIECE - 4 and content[end] & 0xC0 == 0x80:
        end -= 1
    yield start, end
    start = end
  yield start, len(content)


def _lines(content: mmap.mmap) -> Iterator[tuple[int, int]]:
  start = 0
  for line in iter(content.readline, b""):
    if line.strip():
      yield start, start + len(line)
    start += len(line)


def _files(name: str) -> tuple[pathlib.Path, list[pathlib.Path]]:
  """The folder below which keys are told, and the files in order."""
  given = pathlib.Path(name.partition(":")[2]).expanduser()
  if given.is_file():
    return given.parent, [given]
  if given.is_dir():
    root, found = given, given.rglob("*")
  else:
    parts = given.parts
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), None)
    if fixed is None:
      raise ConfigError("data.sources", name, f"there is no such file or folder (from {pathlib.Path.cwd()})")
    root = pathlib.Path(*parts[:fixed])
    found = (pathlib.Path(path) for path in glob.glob(str(given), recursive=True))
  paths = [p for p in found if p.is_file() and not any(part.startswith(".") for part in p.relative_to(root).parts)]
  if not paths:
    raise ConfigError("data.sources", name, "this folder has no files" if given.is_dir() else "no file matches")
  return root, sorted(paths, key=lambda p: p.relative_to(root).as_posix())
