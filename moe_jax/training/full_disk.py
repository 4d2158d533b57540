"""A full disk told in one sentence, whichever library meets it."""

from __future__ import annotations

import contextlib
import errno
import pathlib
import threading
from collections.abc import Iterator

from moe_jax.errors import ConfigError

_WORDS = (
  "no space left on device",
  "disk quota exceeded",
)  # of libraries that pass on a text instead of a number


@contextlib.contextmanager
def told(field: str, directory: pathlib.Path) -> Iterator[None]:
  """Turns an exception of the body that comes from a full disk into a ConfigError about
  `directory`.

  Threads of libraries that meet the full disk meanwhile, such as TensorBoard's, print no traceback
  of their own.
  """
  hook = threading.excepthook
  threading.excepthook = lambda told: None if _is_full(told.exc_value) else hook(told)
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
  """Whether this exception, or one that it came from, is about a full disk."""
  seen = set()
  while error is not None and id(error) not in seen:
    seen.add(id(error))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
      return True
    if any(words in str(error).lower() for words in _WORDS):
      return True
    error = error.__cause__ or error.__context__
  return False
