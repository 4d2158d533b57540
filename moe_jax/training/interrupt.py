"""SIGTERM and SIGINT (Ctrl-C) as a flag that the loop reads between steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

import jax


class Interrupt:
  """A context in which the first SIGTERM or SIGINT only sets `name`; a second SIGINT interrupts at
  once.

  With several processes the signals are left alone: all must stop at the same step, which Orbax
  agrees on.

  Attributes:
    name: of the signal that came; "" as long as none did.
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
    del frame
    if self.name and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.name = signal.Signals(number).name


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
  """A body that SIGTERM ends as Ctrl-C does, by KeyboardInterrupt: for work that can be done again.

  Only a process's main thread can say so; elsewhere nothing changes.
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
