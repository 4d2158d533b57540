"""What a person sees while a run trains: a bar on a terminal, a line per log interval anywhere
else."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

SILENCE = 8.0  # seconds after which something that takes long says that it is still at work


class Progress:
  """Loss, tokens a second and time left of a run.

  Args:
    steps: the run's length.
    start: steps done before.
    tokens_per_step: over all processes.
    active: False on all processes but the first: nothing is shown.
    stream: where to; a bar if it is a terminal.
    clock: seconds; tests pass their own.

  Attributes:
    trouble: what has gone wrong until now, in a few words; shown beside the loss.
  """

  def __init__(
    self,
    steps: int,
    start: int,
    tokens_per_step: int,
    active: bool = True,
    stream=None,
    clock=time.monotonic,
  ):
    self._steps, self._tokens, self._active, self._clock = steps, tokens_per_step, active, clock
    self._stream = stream or sys.stdout
    self._step, self._seconds, self._marked, self._mark = start, 0.0, start, clock()
    self._begun, self._first, self._bar = False, start, None
    self.trouble = ""
    if active and self._stream.isatty():
      import tqdm

      self._bar = tqdm.tqdm(
        total=steps,
        initial=start,
        file=self._stream,
        dynamic_ncols=True,
        smoothing=0.1,
        bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
      )

  def step(self, step: int, loss: float) -> None:
    """Tells that `step` steps are done, the last with this loss."""
    self._step = step
    if not self._begun:  # the first step is mostly compilation: the clock starts behind it
      now = self._clock()
      if self._bar is None:
        self.say(
          f"step {step}/{self._steps}  loss {loss:.4f}  compiled in {now - self._mark:.0f} s"
        )
      self._begun, self._mark, self._marked, self._first = True, now, step, step
    if self._bar is not None:
      self._bar.set_postfix_str(
        f"loss {loss:.3f}, {_short(self._rate() * self._tokens)} tokens/s" + self._suffix(),
        refresh=False,
      )
      self._bar.update(step - self._bar.n)

  def log(self, loss: float) -> float:
    """Ends a log interval: prints its line where there is no bar. Returns tokens a second since the
    last one."""
    rate = self._rate()
    now = self._clock()
    self._seconds += now - self._mark
    self._marked, self._mark = self._step, now
    if self._bar is None:
      done = self._step - self._first
      left = (
        _duration((self._steps - self._step) * self._seconds / done)
        if done and self._seconds
        else "?"
      )
      self.say(
        f"step {self._step}/{self._steps}  loss {loss:.4f}  {_short(rate * self._tokens)} tokens/s "
        f" {left} left" + self._suffix()
      )
    return rate * self._tokens

  def pause(self, seconds: float) -> None:
    """Takes time that was no training (evaluation, saving) off the clock."""
    self._mark += seconds

  def went_back(self, step: int) -> None:
    """Tells that the run goes on from an earlier step."""
    self._step = self._marked = self._first = step
    self._seconds, self._mark = 0.0, self._clock()
    if self._bar is not None:
      self._bar.update(step - self._bar.n)

  def say(self, text: str) -> None:
    """Prints a line, above the bar if there is one."""
    if not self._active:
      return
    if self._bar is not None:
      self._bar.write(text, file=self._stream)
    else:
      print(text, file=self._stream, flush=True)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()

  def _suffix(self) -> str:
    return f"  ({self.trouble})" if self.trouble else ""

  def _rate(self) -> float:
    """Steps a second since the last log."""
    seconds = self._clock() - self._mark
    return (self._step - self._marked) / seconds if seconds > 0 else 0.0


@contextlib.contextmanager
def working(what: str, say: Callable[[str], None], every: float = SILENCE) -> Iterator[None]:
  """Says now and then that the body is still at work, so that a person is never left without a sign
  of life.

  Args:
    what: is being done, as the beginning of a sentence.
    say: prints a line.
    every: seconds between two lines; the first comes after as many.
  """
  done, begun = threading.Event(), time.monotonic()

  def speak():
    while not done.wait(every):
      say(f"{what}: {time.monotonic() - begun:.0f} s so far")

  thread = threading.Thread(target=speak, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()


def _short(number: float) -> str:
  for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
    if number >= size:
      return f"{number / size:.1f}{unit}"
  return f"{number:.0f}"


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}"
