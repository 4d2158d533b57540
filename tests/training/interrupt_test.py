"""The first signal asks the run to stop, and a second SIGINT interrupts it."""

import os
import signal
import threading

import pytest

from moe_jax.training.interrupt import Interrupt, interruptible

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_name_and_kills_nothing(number):
  # Catches a handler for only one of the two signals, and a handler that outlives the loop.
  before = signal.getsignal(number)
  with Interrupt() as interrupt:
    assert interrupt.name == ""
    os.kill(os.getpid(), number)
    assert interrupt.name == signal.Signals(number).name
  assert signal.getsignal(number) is before


def test_a_second_ctrl_c_interrupts():
  # Catches a program that cannot be stopped while it saves.
  with pytest.raises(KeyboardInterrupt):
    with Interrupt():
      os.kill(os.getpid(), signal.SIGINT)
      os.kill(os.getpid(), signal.SIGINT)


def test_work_that_can_be_done_again_ends_at_once():
  # Catches work that SIGTERM kills without an exception, and a handler that outlives it.
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(KeyboardInterrupt):
    with interruptible():
      os.kill(os.getpid(), signal.SIGTERM)
  assert signal.getsignal(signal.SIGTERM) is before
  thread = threading.Thread(target=lambda: interruptible().__enter__())
  thread.start()
  thread.join()
  assert signal.getsignal(signal.SIGTERM) is before
