"""Files that are built once, appear whole or not at all, and may be built by several processes at the same time."""

from __future__ import annotations

import errno
import hashlib
import os
import pathlib
import secrets
import time
from collections.abc import Callable
from typing import BinaryIO

from moe_jax.errors import ConfigError

_STALE = 3600  # seconds after which an unfinished file is the remains of a killed builder


def cache_dir(configured: str) -> pathlib.Path:
  """`data.cache_dir`, or $XDG_CACHE_HOME/moe_jax, or ~/.cache/moe_jax."""
  if configured:
    return pathlib.Path(configured).expanduser()
  return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "moe_jax"


def key(*parts: object) -> str:
  """32 hex digits that name these parts."""
  return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=16).hexdigest()


def built(path: pathlib.Path, write: Callable[[BinaryIO], None]) -> pathlib.Path:
  """`path`, written first by `write(file)` if it is not there.

  The file is written under another name, synced and renamed: a kill leaves the old state, and of two builders the
  last one's file (equal to the first one's, for what is written depends on the key alone) stays.

  Raises:
    ConfigError: the folder cannot be written, or is full.
  """
  if path.exists():
    return path
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(6)}.tmp")
    file = unfinished.open("xb")
  except OSError as error:
    raise ConfigError("data.cache_dir", str(path.parent), f"cannot be written ({error.strerror}); name a folder that "
                      "can, with --config.data.cache_dir=FOLDER") from error
  try:
    with file:
      write(file)
      file.flush()
      os.fsync(file.fileno())
    os.replace(unfinished, path)
  except BaseException as error:
    unfinished.unlink(missing_ok=True)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
      raise ConfigError("data.cache_dir", str(path.parent), "is full; free some space or name another folder, with "
                        "--config.data.cache_dir=FOLDER") from error
    raise
  return path


def _sweep(path: pathlib.Path) -> None:
  for left in path.parent.glob(path.name + ".*.tmp"):
    try:
      if time.time() - left.stat().st_mtime > _STALE:
        left.unlink()
    except FileNotFoundError:
      pass  # another builder was faster
