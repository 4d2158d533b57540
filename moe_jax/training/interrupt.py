"""Turns SIGTERM and SIGINT (Ctrl-C) into a flag that the loop reads between steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

import jax


class Interrupt:
  """A context in which the first SIGTERM or SIGINT only sets `name`.

  A SIGINT after that interrupts at once. With several processes the signals are left alone, because
  all processes must stop at the same step, on which Orbax makes them agree.

  Attributes:
    name: The name of the last signal, or "" if there was none.
  """

  def __init__(self):
    self.name = ""
    self._before = {}

  def __enter__(self) -> Interrupt:
    if jax.process_count() == 1:
      self._before = {
        number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
      }
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _note(self, number, frame) -> None:
    """Handles a signal."""
    del frame
    if self.name and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.name = signal.Signals(number).name


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
  """Lets SIGTERM end the body as Ctrl-C does, by KeyboardInterrupt.

  This suits work that can be done again. Python allows only the main thread to set signal handlers;
  in other threads nothing changes.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return

  def interrupt(number, frame):
    del number, frame
    raise KeyboardInterrupt

  before = signal.signal(signal.SIGTERM, interrupt)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)
