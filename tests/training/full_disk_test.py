"""A full disk is reported in one sentence, whichever library meets it; other errors pass."""

import errno
import pathlib
import threading

import pytest

from moe_jax.errors import ConfigError
from moe_jax.training import full_disk

pytestmark = pytest.mark.unit


def raised(error, cause=None):
  with full_disk.told("workdir", pathlib.Path("runs/x")):
    raise error from cause


@pytest.mark.parametrize(
  "error, cause",
  [
    (OSError(errno.ENOSPC, "No space left on device"), None),
    (OSError(errno.EDQUOT, "quota"), None),
    (
      ValueError(
        "RESOURCE_EXHAUSTED: Error writing x: No space left on device [os_error_code='28']"
      ),
      None,
    ),
    (RuntimeError("the writer has failed"), OSError(errno.ENOSPC, "full")),
  ],
)
def test_a_full_disk_is_told_in_a_sentence(error, cause):
  # Catches the 459 lines of TensorStore's traceback, and an error that another library has wrapped.
  with pytest.raises(
    ConfigError, match="workdir='runs/x': there is no room left .* free some space"
  ):
    raised(error, cause)


def test_other_errors_pass():
  # Catches a bug of the program that is blamed on the disk.
  for error in (OSError(errno.EIO, "broken"), KeyError("x"), ConfigError("a", 1, "b")):
    with pytest.raises(type(error)) as found:
      raised(error)
    assert found.value is error


def test_threads_that_meet_the_full_disk_are_silent_and_others_are_not(monkeypatch):
  # Catches the traceback of a library's thread beside the sentence, and a hidden error of another
  # thread.
  seen = []
  monkeypatch.setattr(threading, "excepthook", lambda told: seen.append(type(told.exc_value)))

  def fail(error):
    raise error

  with full_disk.told("workdir", pathlib.Path("x")):
    for error in (OSError(errno.ENOSPC, "full"), KeyError("other")):
      thread = threading.Thread(target=fail, args=(error,))
      thread.start()
      thread.join()
  assert seen == [KeyError]
