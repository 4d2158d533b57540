"""The progress of a run on the screen.

On a terminal it is a bar. Anywhere else it is a line for each log interval.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

# Seconds after which a long operation reports that it is still at work.
SILENCE = 8.0


class Progress:
  """Shows the loss, the tokens per second and the remaining time of a run.

  Attributes:
    trouble: What has gone wrong so far, in a few words that are shown beside the loss; "" if
      nothing has.
    routing: How the experts are used, in a few words that are shown beside the loss, or "".
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
    """Starts the clock, and the bar if `stream` is a terminal.

    Args:
      steps: The number of steps of the whole run.
      start: The number of steps that were done before.
      tokens_per_step: Tokens per step over all processes.
      active: Whether anything is shown, which only the first process does.
      stream: The stream to which the progress is written. None means standard output.
      clock: A function that returns seconds. Tests pass their own.
    """
    self._steps, self._tokens, self._active, self._clock = steps, tokens_per_step, active, clock
    self._stream = stream or sys.stdout
    self._step, self._seconds, self._marked, self._mark = start, 0.0, start, clock()
    self._begun, self._first, self._bar = False, start, None
    self.trouble = self.routing = ""
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
    """Records that `step` steps are done, the last of them with this loss."""
    self._step = step
    # The first step mostly consists of compilation, so the clock starts after it.
    if not self._begun:
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
    """Ends a log interval and returns its tokens per second; prints a line if there is no bar."""
    rate = self._rate()
    now = self._clock()
    self._seconds += now - self._mark
    self._marked, self._mark = self._step, now
    if self._bar is None:
      done = self._step - self._first
      left = (
        duration((self._steps - self._step) * self._seconds / done)
        if done and self._seconds
        else "?"
      )
      self.say(
        f"step {self._step}/{self._steps}  loss {loss:.4f}  {_short(rate * self._tokens)} tokens/s "
        f" {left} left" + self._suffix()
      )
    return rate * self._tokens

  def pause(self, seconds: float) -> None:
    """Takes time that was not spent on training (evaluation, saving) off the clock."""
    self._mark += seconds

  def went_back(self, step: int) -> None:
    """Records that the run has gone back and continues from an earlier step."""
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
    """Closes the bar if there is one."""
    if self._bar is not None:
      self._bar.close()

  def _suffix(self) -> str:
    """Returns the use of the experts, and the trouble in parentheses, as far as there are any."""
    trouble = f"({self.trouble})" if self.trouble else ""
    return "".join(f"  {words}" for words in (self.routing, trouble) if words)

  def _rate(self) -> float:
    """Returns the steps per second since the last log line."""
    seconds = self._clock() - self._mark
    return (self._step - self._marked) / seconds if seconds > 0 else 0.0


@contextlib.contextmanager
def working(what: str, say: Callable[[str], None], every: float = SILENCE) -> Iterator[None]:
  """Reports at intervals that the body is still at work.

  Args:
    what: What the body does, as the beginning of a sentence.
    say: A function that prints a line.
    every: Seconds before the first line and between two lines.
  """
  begun = time.monotonic()
  with repeating(lambda: say(f"{what}: {time.monotonic() - begun:.0f} s so far"), every):
    yield


@contextlib.contextmanager
def repeating(act: Callable[[], None], every: float = SILENCE) -> Iterator[None]:
  """Calls a function at intervals, in a thread of its own, while the body runs.

  Args:
    act: The function.
    every: Seconds before the first call and between two calls.
  """
  done = threading.Event()

  def repeat():
    while not done.wait(every):
      act()

  thread = threading.Thread(target=repeat, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()


def _short(number: float) -> str:
  """Returns a number with a unit, as in "1.2M"."""
  for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
    if number >= size:
      return f"{number / size:.1f}{unit}"
  return f"{number:.0f}"


def duration(seconds: float) -> str:
  """Returns a duration as hours:minutes:seconds."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}"
