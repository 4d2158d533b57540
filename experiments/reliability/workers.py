"""Long-lived processes that try one case at a time and are killed if one takes too long."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

from experiments.reliability import small

# The number of cases after which a process is replaced, because JAX keeps all that it has traced.
LIFE = 250

# Compiling fast matters more than running fast. A program that was compiled once is read from the
# cache.
ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  "XLA_FLAGS": small.QUICK,
}


def work(
  function: Callable[..., Any],
  cases: Sequence[tuple],
  limit: Callable[[tuple], float],
  processes: int,
  cache: pathlib.Path,
) -> Iterator[tuple[tuple, Any]]:
  """Yields `(case, function(*case))` as the results come in.

  Args:
    function: A function of a module, so that a new process can import it.
    cases: The arguments of each call.
    limit: Returns the seconds that a case may take. A case that takes longer yields None.
    processes: The number of cases at a time.
    cache: The folder of compiled programs, which all processes share.
  """

  def start():
    return _Worker(function, ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": str(cache)})

  left, workers = list(reversed(cases)), [start() for _ in range(min(processes, len(cases)))]
  try:
    while left or any(worker.case for worker in workers):
      for i, worker in enumerate(workers):
        if not worker.case and left:
          if worker.done >= LIFE:
            worker.stop()
            worker = workers[i] = start()
          worker.begin(left.pop())
      busy = [worker for worker in workers if worker.case]
      multiprocessing.connection.wait([worker.pipe for worker in busy], timeout=1.0)
      for i, worker in enumerate(workers):
        if not worker.case:
          continue
        case, late = (
          worker.case,
          time.monotonic() - worker.since > limit(worker.case) + worker.grace,
        )
        if worker.pipe.poll():
          answered, result = worker.end()
        elif late or not worker.process.is_alive():
          answered, result = False, None
        else:
          continue
        if not answered:
          worker.stop()
          workers[i] = start()
        yield case, result
  finally:
    for worker in workers:
      worker.stop()


class _Worker:
  """A process and the case that it is trying."""

  def __init__(self, function: Callable[..., Any], environment: Mapping[str, str]):
    context = multiprocessing.get_context("spawn")
    self.pipe, theirs = context.Pipe()
    self.process = context.Process(target=_serve, args=(theirs, function), daemon=True)
    with mock.patch.dict(os.environ, environment):  # which the process inherits
      self.process.start()
    theirs.close()
    self.case, self.since, self.done = None, 0.0, 0

  @property
  def grace(self) -> float:
    """The additional seconds of the first case, in which JAX is imported."""
    return 60.0 * (not self.done)

  def begin(self, case: tuple) -> None:
    """Hands a case to the process."""
    self.case, self.since = case, time.monotonic()
    with contextlib.suppress(OSError):  # the process has died, which `end` notices
      self.pipe.send(case)

  def end(self) -> tuple[bool, Any]:
    """Returns whether there is an answer, and the answer; a process that died gives none."""
    try:
      answer = True, self.pipe.recv()
    except (EOFError, OSError):
      answer = False, None
    self.case, self.done = None, self.done + 1
    return answer

  def stop(self) -> None:
    """Kills the process."""
    self.process.kill()
    self.process.join()


def _serve(pipe, function) -> None:
  quiet = os.open(os.devnull, os.O_WRONLY)
  os.dup2(quiet, 1)
  os.dup2(quiet, 2)  # libraries in C++ write to it directly
  while True:
    try:
      case = pipe.recv()
    except (EOFError, OSError):
      return
    pipe.send(function(*case))
