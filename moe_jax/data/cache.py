"""A cache of files that are built once, written atomically, and checked before use.

Several processes may build the same file at the same time. A file consists of its content and a
trailer, which holds the SHA-256 digest of the content and a mark. A file does not match its trailer
if it was truncated, if any byte of it changed, or if it was written before there were trailers.
Such a file is built again.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import pathlib
import secrets
import time
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
from jaxtyping import UInt8

from moe_jax.data.notes import tell
from moe_jax.errors import ConfigError

_STALE = 3600  # seconds after which an unfinished file is taken to be left by a killed process
_MARK = b"moe_jax cache 1\n"
_TRAILER = hashlib.sha256().digest_size + len(_MARK)  # bytes
_ANOTHER = "name another folder with --config.data.cache_dir=FOLDER"

# Path -> (inode, size in bytes, time of the last write) of the files whose content this process has
# checked already.
_whole: dict[pathlib.Path, tuple[int, int, int]] = {}


def cache_dir(configured: str) -> pathlib.Path:
  """Returns the folder of the cache.

  This is `configured` (data.cache_dir) or, if that is empty, $XDG_CACHE_HOME/moe_jax or
  ~/.cache/moe_jax.

  Raises:
    ConfigError: If the home directory in the path cannot be determined.
  """
  try:
    if configured:
      return pathlib.Path(configured).expanduser()
    return (
      pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "moe_jax"
    )
  except RuntimeError as error:
    raise ConfigError(
      "data.cache_dir", configured, f"cannot be located ({error}); {_ANOTHER}"
    ) from error


def key(*parts: object) -> str:
  """Returns a hash of the parts as 32 hexadecimal digits."""
  return hashlib.blake2b(
    "\0".join(map(str, parts)).encode("utf-8", "surrogateescape"), digest_size=16
  ).hexdigest()


def built(
  path: pathlib.Path,
  write: Callable[[BinaryIO], object],
  good: Callable[[UInt8[np.ndarray, " n"]], bool] = lambda content: True,
) -> pathlib.Path:
  """Returns `path`, after writing the file if it does not exist or is damaged.

  A damaged file is reported in one line. The file is written under another name, synced and
  renamed, so that a process that is killed leaves the old state behind. If two processes build the
  file, that of the last one stays. The two are equal, because what is written depends only on the
  key in the file's name.

  A process hashes the content once, and again if the file has changed since then. This takes about
  a minute at each start for 50 billion tokens of two bytes: one core hashes 0.8 GB/s without SHA
  instructions and 1.5 to 2 GB/s with them.

  Args:
    path: The path of the file.
    write: Writes the content into an open file. What it returns is ignored.
    good: Returns whether content with the right digest can be used.

  Raises:
    ConfigError: If the folder cannot be read or written, or if it is full.
  """
  try:
    if _is_whole(path, good):
      return path
  except (OSError, ValueError) as error:  # ValueError is raised for a null byte in the path.
    raise ConfigError(
      "data.cache_dir", str(path), f"cannot be read ({_reason(error)}); {_ANOTHER}"
    ) from error
  replace(path, write)
  with path.open("rb") as file:
    _whole[path] = _identity(file)
  return path


def replace(path: pathlib.Path, write: Callable[[BinaryIO], object], trailer: bool = True) -> None:
  """Writes a new file at `path` atomically; see `built`.

  Args:
    path: The path of the file, which may exist.
    write: Writes the content into an open file. What it returns is ignored.
    trailer: Whether a trailer is added. False is meant for content with a digest of its own.

  Raises:
    ConfigError: If the folder cannot be written, or if it is full.
  """
  unfinished = path.with_name(f"{path.name}.{secrets.token_hex(6)}.tmp")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    file = unfinished.open("x+b")
  except (OSError, ValueError) as error:
    what = f"cannot be written ({_reason(error)}); {_ANOTHER}"
    raise ConfigError("data.cache_dir", str(path.parent), what) from error
  try:
    with file:
      write(file)
      if trailer:
        size = file.seek(0, os.SEEK_END)
        file.write(_digest(file, size) + _MARK)
      file.flush()
      os.fsync(file.fileno())
    os.replace(unfinished, path)
  except BaseException as error:
    unfinished.unlink(missing_ok=True)
    # An error that names another path is not about this folder: for example, `write` may be unable
    # to read a source.
    if isinstance(error, OSError) and error.filename in (None, str(unfinished)):
      full = error.errno in (errno.ENOSPC, errno.EDQUOT)
      what = "is full; free some space, or" if full else f"cannot be written ({_reason(error)});"
      raise ConfigError("data.cache_dir", str(path.parent), f"{what} {_ANOTHER}") from error
    raise


def content(path: pathlib.Path) -> UInt8[np.ndarray, " n"]:
  """Returns the content of a file that `built` returned, memory-mapped and without its trailer."""
  size = path.stat().st_size - _TRAILER
  return np.memmap(path, np.uint8, "r", shape=(size,)) if size else np.zeros(0, np.uint8)


class Unchanged:
  """Checks that a memory-mapped file of the cache is not written to while it is used.

  Reading a memory-mapped file beyond the point at which it was truncated kills the process without
  any message. A check takes a microsecond. Replacing or deleting the file is harmless, because the
  mapped content stays.
  """

  def __init__(self, path: str | os.PathLike):
    # The file stays open, so that `check` sees the mapped file even if the path is replaced.
    self._path, self._file = path, open(path, "rb")
    self._identity = _identity(self._file)

  def check(self) -> None:
    """Raises ConfigError if the file was written to."""
    if _identity(self._file) != self._identity:
      raise ConfigError(
        "data.cache_dir",
        str(self._path),
        "was written to while this run read it; run the same "
        "command again, which checks the file and builds it anew",
      )


def _is_whole(path: pathlib.Path, good: Callable[[UInt8[np.ndarray, " n"]], bool]) -> bool:
  """Returns whether the file exists and is whole, and prints a note if it is damaged.

  A file is whole if its content matches its trailer and is `good`.
  """
  try:
    file = path.open("rb")
  except FileNotFoundError:
    return False
  with file:
    identity = _identity(file)
    if _whole.get(path) == identity:
      return True
    size = identity[1] - _TRAILER
    file.seek(max(size, 0))
    trailer = file.read()
    if (
      size >= 0
      and trailer[-len(_MARK) :] == _MARK
      and trailer == _digest(file, size) + _MARK
      and good(content(path))
    ):
      _whole[path] = identity
      return True
  tell(f"{path} is damaged (cut, changed, or from an earlier version) and is built anew")
  return False


def _digest(file: io.BufferedIOBase, size: int) -> bytes:
  """Returns the SHA-256 digest of the first `size` bytes and leaves the file at their end."""
  # The file is read and not mapped, because it may be truncated meanwhile.
  digest, block = hashlib.sha256(), memoryview(bytearray(1 << 20))
  file.seek(0)
  while size and (count := file.readinto(block[: min(size, len(block))])):
    digest.update(block[:count])
    size -= count
  return digest.digest()


def _identity(file: io.BufferedIOBase) -> tuple[int, int, int]:
  """Returns the inode, the size in bytes and the time of the last write of an open file."""
  stat = os.fstat(file.fileno())
  return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _reason(error: OSError | ValueError) -> str:
  """Returns the message of an error without its number and path."""
  return getattr(error, "strerror", None) or str(error)


def _sweep(path: pathlib.Path) -> None:
  """Deletes the unfinished files that killed processes have left for `path`."""
  for unfinished in path.parent.glob(path.name + ".*.tmp"):
    try:
      if time.time() - unfinished.stat().st_mtime > _STALE:
        unfinished.unlink()
    except FileNotFoundError:
      pass  # Another process has deleted or renamed it.
