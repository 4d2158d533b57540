"""SIGTERM and SIGINT (Ctrl-C) as a flag that the loop reads between steps."""

from __future__ import annotations

import signal

import jax


class Interrupt:
  """A context in which the first SIGTERM or SIGINT only sets `name`; a second SIGINT interrupts at once.

  With several processes the signals are left alone: all must stop at the same step, which Orbax agrees on.

  Attributes:
    name: of the signal that came; "" as long as none did.
  """

  def __init__(self):
    self.name = ""
    self._before = {}

  def __enter__(self) -> Interrupt:
    if jax.process_count() == 1:
      self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _note(self, number, frame) -> None:
    del frame
    if self.name and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.name = signal.Signals(number).name
