"""Files that are built once, appear whole or not at all, are checked before use, and may be built
by several processes.

A file is its content and a trailer: SHA-256 of the content, and a mark. A file that was cut,
flipped, overwritten, or written before there were trailers does not match it, and is built again.
"""

from __future__ import annotations

import errno
import hashlib
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

_STALE = 3600  # seconds after which an unfinished file is the remains of a killed builder
_MARK = b"moe_jax cache 1\n"
_TRAILER = hashlib.sha256().digest_size + len(_MARK)  # bytes
_ANOTHER = "name another folder with --config.data.cache_dir=FOLDER"

# Path -> what identifies the file that this process has found whole there: inode, bytes, time of
# the last write.
_whole: dict[pathlib.Path, tuple[int, int, int]] = {}


def cache_dir(configured: str) -> pathlib.Path:
  """`data.cache_dir`, or $XDG_CACHE_HOME/moe_jax, or ~/.cache/moe_jax.

  Raises:
    ConfigError: it is below the home of an unknown user.
  """
  try:
    if configured:
      return pathlib.Path(configured).expanduser()
    return (
      pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "moe_jax"
    )
  except RuntimeError as error:
    raise ConfigError(
      "data.cache_dir", configured, f"has no place ({error}); {_ANOTHER}"
    ) from error


def key(*parts: object) -> str:
  """32 hex digits that name these parts."""
  return hashlib.blake2b(
    "\0".join(map(str, parts)).encode("utf-8", "surrogateescape"), digest_size=16
  ).hexdigest()


def built(
  path: pathlib.Path,
  write: Callable[[BinaryIO], None],
  good: Callable[[UInt8[np.ndarray, " n"]], bool] = lambda content: True,
) -> pathlib.Path:
  """`path`, written first by `write(file)` if it is not there whole; what is damaged is told in one
  line.

  The file is written under another name, synced and renamed: a kill leaves the old state, and of
  two builders the last one's file (equal to the first one's, for what is written depends on the key
  alone) stays.

  The content is hashed once in a process, and again when the file has changed since: 0.8 GB/s on
  one core without SHA instructions, 1.5 to 2 GB/s with them, so about a minute at each start for 50
  billion tokens of two bytes.

  Args:
    good: whether content with the right digest can be used.
  Raises:
    ConfigError: the folder cannot be read or written, or is full.
  """
  try:
    if _is_whole(path, good):
      return path
  except (OSError, ValueError) as error:  # ValueError: a null byte in the path
    raise ConfigError(
      "data.cache_dir", str(path), f"cannot be read ({_reason(error)}); {_ANOTHER}"
    ) from error
  replace(path, write)
  with path.open("rb") as file:
    _whole[path] = _identity(file)
  return path


def replace(path: pathlib.Path, write: Callable[[BinaryIO], None], trailer: bool = True) -> None:
  """Writes `path` anew; see `built`.

  Args:
    trailer: False: the content holds a digest of its own.
  Raises:
    ConfigError: the folder cannot be written, or is full.
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
    # Only what is said of a path other than ours is not about this folder, such as a text that
    # cannot be read.
    if isinstance(error, OSError) and error.filename in (None, str(unfinished)):
      full = error.errno in (errno.ENOSPC, errno.EDQUOT)
      what = "is full; free some space, or" if full else f"cannot be written ({_reason(error)});"
      raise ConfigError("data.cache_dir", str(path.parent), f"{what} {_ANOTHER}") from error
    raise


def content(path: pathlib.Path) -> UInt8[np.ndarray, " n"]:
  """What was written into the file that `built` returned, memory-mapped, without its trailer."""
  size = path.stat().st_size - _TRAILER
  return np.memmap(path, np.uint8, "r", shape=(size,)) if size else np.zeros(0, np.uint8)


class Unchanged:
  """Tells when a file of the cache changes while it is used.

  To read a memory-mapped file where it was cut kills a process, without a word. To ask costs a
  microsecond. The file may be replaced or deleted; what was mapped stays.
  """

  def __init__(self, path: str | os.PathLike):
    self._path, self._file = path, open(path, "rb")  # open while this object lives
    self._identity = _identity(self._file)

  def check(self) -> None:
    """Raises ConfigError if somebody wrote into the file."""
    if _identity(self._file) != self._identity:
      raise ConfigError(
        "data.cache_dir",
        str(self._path),
        "was written to while this run read it; run the same "
        "command again, which checks the file and builds it anew",
      )


def _is_whole(path: pathlib.Path, good: Callable[[UInt8[np.ndarray, " n"]], bool]) -> bool:
  """Whether the file is there with content that matches its trailer; tells if it is there and does
  not."""
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


def _digest(file: BinaryIO, size: int) -> bytes:
  """SHA-256 of the first `size` bytes; leaves the file at their end. Reads, for a mapped file may
  be cut meanwhile."""
  digest, block = hashlib.sha256(), memoryview(bytearray(1 << 20))
  file.seek(0)
  while size and (count := file.readinto(block[: min(size, len(block))])):
    digest.update(block[:count])
    size -= count
  return digest.digest()


def _identity(file: BinaryIO) -> tuple[int, int, int]:
  known = os.fstat(file.fileno())
  return known.st_ino, known.st_size, known.st_mtime_ns


def _reason(error: OSError | ValueError) -> str:
  return getattr(error, "strerror", None) or str(error)


def _sweep(path: pathlib.Path) -> None:
  for left in path.parent.glob(path.name + ".*.tmp"):
    try:
      if time.time() - left.stat().st_mtime > _STALE:
        left.unlink()
    except FileNotFoundError:
      pass  # another builder was faster
