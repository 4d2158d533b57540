"""A run shows lines in a log, a bar on a terminal, and nothing on other processes."""

import io
import time

import pytest

from moe_jax.training.progress import Progress, working

pytestmark = pytest.mark.unit


class Clock:
  now = 0.0

  def __call__(self):
    return self.now


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_a_line_has_loss_rate_and_time_left():
  # Catches a rate that includes compilation, and a remaining time that counts the steps before a
  # resume.
  clock, out = Clock(), io.StringIO()
  progress = Progress(steps=1011, start=1000, tokens_per_step=500, stream=out, clock=clock)
  # The first step compiles.
  clock.now += 100.0
  progress.step(1001, 5.0)
  for n in range(1002, 1007):
    clock.now += 2.0
    progress.step(n, 4.0)
  assert progress.log(4.0) == pytest.approx(250.0)  # 500 tokens / 2 s
  assert out.getvalue() == (
    "step 1001/1011  loss 5.0000  compiled in 100 s\n"
    "step 1006/1011  loss 4.0000  250 tokens/s  0:00:10 left\n"
  )


def test_time_of_evaluation_does_not_count():
  # Catches a rate that drops after every evaluation.
  clock = Clock()
  progress = Progress(10, 0, 100, stream=io.StringIO(), clock=clock)
  progress.step(1, 1.0)
  clock.now += 50.0
  progress.pause(50.0)
  clock.now += 1.0
  progress.step(2, 1.0)
  assert progress.log(1.0) == pytest.approx(100.0)


def test_a_terminal_gets_a_bar_and_no_lines():
  # Catches a bar that is never drawn, and log lines that interrupt it.
  out = Terminal()
  progress = Progress(4, 0, 100, stream=out)
  for n in range(1, 5):
    progress.step(n, 1.5)
    progress.log(1.5)
  progress.close()
  assert (
    "4/4" in out.getvalue() and "loss 1.500" in out.getvalue() and "step 4/4" not in out.getvalue()
  )


def test_other_processes_are_silent():
  # Catches a copy of each line from every process.
  out = io.StringIO()
  progress = Progress(4, 0, 100, active=False, stream=out)
  progress.step(1, 1.0)
  progress.log(1.0)
  progress.say("x")
  assert out.getvalue() == ""


def test_what_takes_long_says_that_it_is_at_work():
  # Catches silence, and a thread that keeps reporting after the work is done.
  said = []
  with working("counting", said.append, every=0.01):
    while not said:
      time.sleep(0.001)
  count = len(said)
  time.sleep(0.05)
  assert said[0] == "counting: 0 s so far" and len(said) == count


def test_trouble_stays_in_sight_and_going_back_is_no_progress():
  # Catches skipped updates that only one line mentions, and a bar or a rate that counts steps twice
  # after a rollback.
  clock, out = Clock(), io.StringIO()
  progress = Progress(steps=100, start=0, tokens_per_step=10, stream=out, clock=clock)
  progress.trouble, progress.routing = "2 skipped updates", "max load 1.5x"
  clock.now += 1.0
  progress.step(50, 1.0)
  progress.log(1.0)
  assert out.getvalue().rstrip().endswith("max load 1.5x  (2 skipped updates)")
  progress.went_back(20)
  clock.now += 1.0
  progress.step(30, 1.0)
  # Ten steps of ten tokens take a second.
  assert progress.log(1.0) == 100.0
