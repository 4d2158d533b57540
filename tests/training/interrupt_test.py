"""The first signal asks, the second SIGINT insists."""

import os
import signal

import pytest

from moe_jax.training.interrupt import Interrupt

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_name_and_kills_nothing(number):
  # Catches: a handler for one of the two only, or one that outlives the loop.
  before = signal.getsignal(number)
  with Interrupt() as interrupt:
    assert interrupt.name == ""
    os.kill(os.getpid(), number)
    assert interrupt.name == signal.Signals(number).name
  assert signal.getsignal(number) is before


def test_a_second_ctrl_c_interrupts():
  # Catches: a program that cannot be stopped while it saves.
  with pytest.raises(KeyboardInterrupt):
    with Interrupt():
      os.kill(os.getpid(), signal.SIGINT)
      os.kill(os.getpid(), signal.SIGINT)
