"""The embedded corpus, which is made of text that every Python installation contains.

It needs no download and has three domains:

- prose: the reference topics of `pydoc_data.topics` and the docstrings of each standard-library
  module, in English.
- code: the standard library without its docstrings and comments (`ast.unparse`).
- tables: the Unicode character database as `code;name;category;...`, 128 rows per document.

The text is that of the running interpreter. It changes a little with each Python release, so
numbers can be compared only if the fingerprints agree. Only modules that every distribution ships
are read; Debian, for example, leaves out `test`.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import io
import pathlib
import sys
import sysconfig
import unicodedata
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np
from absl import logging

from moe_jax.data import cache
from moe_jax.data.documents import InMemory, Subset, split
from moe_jax.data.options import DataOptions
from moe_jax.errors import ConfigError, choose

_RECIPE = 1  # Increase this when the text that the functions below produce changes.
_MIN_DOCSTRING = 80  # characters; shorter docstrings are mostly formulaic
_ROWS = 128  # rows of the Unicode tables per document
# Folders and modules that are not read: tests, data in the form of code, and vendored or optional
# packages that distributions split off.
_LEFT_OUT = {
  "__pycache__",
  "dist-packages",
  "distutils",
  "encodings",
  "ensurepip",
  "idlelib",
  "lib2to3",
  "msilib",
  "pydoc_data",
  "site-packages",
  "test",
  "tests",
  "tkinter",
  "turtle",
  "turtledemo",
}


def embedded(name: str, data: DataOptions) -> tuple[str, dict[str, Subset]]:
  """Opens the source `embedded:DOMAIN` and returns its fingerprint and its splits.

  Args:
    name: The source as `data.sources` names it.
    data: The options of the data.

  Raises:
    ConfigError: If there is no such domain, or if the files of the standard library are missing.
  """
  domain = name.partition(":")[2]
  build = choose("data.sources", domain, DOMAINS, shown=name)
  # `choose` only checks the name: all domains are built together, because code and prose come from
  # one pass over the library.
  del build
  documents, fingerprint = _load(cache.cache_dir(data.cache_dir))[domain]
  return fingerprint, split(name, documents, data.validation_fraction)


def _load(folder: pathlib.Path) -> dict[str, tuple[InMemory, str]]:
  """Returns the documents and the fingerprint of each domain, from the cache in `folder`."""
  return _read(_build(folder))


def _build(folder: pathlib.Path) -> pathlib.Path:
  """Returns the path of the corpus in the cache, after building it if it is not there."""
  stdlib = sysconfig.get_path("stdlib")
  path = folder / f"embedded-{cache.key(_RECIPE, sys.version, stdlib)}.npz"
  return cache.built(path, _write)


def _write(file: BinaryIO) -> None:
  """Builds the corpus and writes it as an .npz file."""
  logging.info(
    "collecting the embedded corpus from Python %s (once, some seconds)", sys.version.split()[0]
  )
  arrays = {}
  for domain, documents in corpus().items():
    keys, texts = zip(*documents, strict=True)
    arrays[f"{domain}.keys"] = np.array(keys)
    arrays[f"{domain}.ends"] = np.cumsum([len(t) for t in texts])
    arrays[f"{domain}.text"] = np.frombuffer(b"".join(texts), np.uint8)
  np.savez(file, **arrays)


@functools.lru_cache(maxsize=4)
def _read(path: pathlib.Path) -> dict[str, tuple[InMemory, str]]:
  """Returns the documents and the fingerprint of each domain in an .npz file."""
  out = {}
  with np.load(io.BytesIO(cache.content(path).data)) as arrays:
    for domain in DOMAINS:
      keys, ends, text = (arrays[f"{domain}.{part}"] for part in ("keys", "ends", "text"))
      digest = hashlib.sha256(
        "\0".join(keys).encode() + ends.astype("<i8").tobytes() + text.tobytes()
      )
      out[domain] = InMemory(keys.tolist(), text, ends), digest.hexdigest()
  return out


def corpus() -> dict[str, list[tuple[str, bytes]]]:
  """Builds the corpus, which takes some seconds.

  Returns:
    Domain -> list of the (key, text) of its documents, in a fixed order. Documents without text are
    left out.

  Raises:
    ConfigError: If the source files of the standard library are missing.
  """
  modules = [(key, _parse(path)) for key, path in _modules()]
  modules = [(key, tree) for key, tree in modules if tree is not None]
  if len(modules) < 100:
    raise ConfigError(
      "data.sources",
      "embedded",
      "the source files of Python's standard library are not in "
      f"{sysconfig.get_path('stdlib')}; use text:, jsonl: or tfds: sources",
    )
  # The order of DOMAINS matters: `_code` changes the trees after `_prose` has read them.
  made = {domain: list(build(modules)) for domain, build in DOMAINS.items()}
  return {
    domain: [(key, text.encode()) for key, text in documents if text]
    for domain, documents in made.items()
  }


def _modules() -> Iterator[tuple[str, pathlib.Path]]:
  """Yields the (key, path) of the modules of the standard library that are read."""
  root = pathlib.Path(sysconfig.get_path("stdlib"))
  for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
    parts = path.relative_to(root).with_suffix("").parts
    if (
      parts[0] in sys.stdlib_module_names
      and not parts[0].startswith("_sysconfigdata")
      and not _LEFT_OUT & set(parts)
    ):
      yield "/".join(parts), path


def _parse(path: pathlib.Path) -> ast.Module | None:
  """Returns the syntax tree of a file, or None if the file is not valid Python."""
  try:
    return ast.parse(path.read_bytes())
  except (SyntaxError, ValueError):  # The library contains templates that are not Python.
    return None


def _prose(modules: Iterable[tuple[str, ast.Module]]) -> Iterator[tuple[str, str]]:
  """Yields the (key, text) of the reference topics and of the docstrings of each module."""
  from pydoc_data.topics import topics

  for topic in sorted(topics):
    yield f"topic/{topic}", topics[topic].strip() + "\n"
  for key, tree in modules:
    docstrings = (
      ast.get_docstring(node, clean=False)
      for node in ast.walk(tree)
      if isinstance(node, _DOCUMENTED)
    )
    long = [inspect.cleandoc(text) for text in docstrings if text and len(text) >= _MIN_DOCSTRING]
    yield f"docstrings/{key}", "\n\n".join(long) + "\n" if long else ""


def _code(modules: Iterable[tuple[str, ast.Module]]) -> Iterator[tuple[str, str]]:
  """Yields the (key, text) of each module's code without docstrings and comments.

  This removes the docstrings from the trees in place, so it must run after `_prose`.
  """
  for key, tree in modules:
    for node in ast.walk(tree):
      if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
        # A class or function must keep at least one statement.
        node.body = node.body[1:] or ([] if isinstance(node, ast.Module) else [ast.Pass()])
    source = ast.unparse(tree)
    yield key, source + "\n" if source else ""


def _tables(modules: Iterable[tuple[str, ast.Module]]) -> Iterator[tuple[str, str]]:
  """Yields the (key, text) of the Unicode character database."""
  del modules
  named = ((code, unicodedata.name(chr(code), "")) for code in range(sys.maxunicode + 1))
  # Names that are computed from the code are left out: those of ideographs and Hangul syllables.
  rows = [
    _row(code)
    for code, name in named
    if name and not name.endswith(f"-{code:04X}") and not name.startswith("HANGUL SYLLABLE ")
  ]
  for start in range(0, len(rows), _ROWS):
    yield f"rows/{start // _ROWS:04d}", "".join(rows[start : start + _ROWS])


def _row(code: int) -> str:
  """Returns the line of the tables that describes one character."""
  c = chr(code)
  return (
    f"{code:04X};{unicodedata.name(c)};{unicodedata.category(c)};{unicodedata.combining(c)};"
    f"{unicodedata.bidirectional(c)};{unicodedata.decomposition(c)};{unicodedata.numeric(c, '')};"
    f"{unicodedata.mirrored(c)};{unicodedata.east_asian_width(c)}\n"
  )


_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
DOMAINS = {"prose": _prose, "code": _code, "tables": _tables}
