"""Reports a full disk in one sentence, whichever library meets it."""

from __future__ import annotations

import contextlib
import errno
import pathlib
import threading
from collections.abc import Iterator

from moe_jax.errors import ConfigError

# Some libraries pass on the text of the error instead of its number.
_WORDS = ("no space left on device", "disk quota exceeded")


@contextlib.contextmanager
def told(field: str, directory: pathlib.Path) -> Iterator[None]:
  """Turns an exception of the body that comes from a full disk into a ConfigError.

  Meanwhile the threads of libraries that meet the full disk, such as TensorBoard's, print no
  traceback.

  Args:
    field: The config key that the ConfigError names.
    directory: The directory that the ConfigError names.
  """
  hook = threading.excepthook
  threading.excepthook = lambda failure: None if _is_full(failure.exc_value) else hook(failure)
  try:
    yield
  except ConfigError:
    raise
  except Exception as error:
    if not _is_full(error):
      raise
    raise ConfigError(
      field,
      str(directory),
      "there is no room left on its disk; what was saved before is kept; free "
      "some space, and the same command goes on from the last checkpoint",
    ) from error
  finally:
    threading.excepthook = hook


def _is_full(error: BaseException | None) -> bool:
  """Returns whether this exception, or one of its causes, is about a full disk."""
  # A chain of causes may contain a cycle, so each exception is visited once.
  visited = set()
  while error is not None and id(error) not in visited:
    visited.add(id(error))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
      return True
    if any(words in str(error).lower() for words in _WORDS):
      return True
    error = error.__cause__ or error.__context__
  return False
