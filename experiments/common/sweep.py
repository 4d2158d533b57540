"""Runs the rows of a study, each in a process of its own, and keeps one line of results for each.

A row is a config and the keys that it changes. `python -m experiments STUDY run` calls `run`.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from experiments.common import journal
from experiments.common.entry import parse
from moe_jax.errors import EXIT_DIVERGED, ConfigError
from moe_jax.options import Config
from moe_jax.training import progress

# Fields of a run's results.json that a line of results leaves out, because they are long or because
# the line has them elsewhere.
DROPPED = ("sample", "command", "compare", "ladder")
# A bar of tqdm: steps done, all steps, and the time that is left.
_BAR = re.compile(r"(\d+)/(\d+) \[[^<]*<([\d:]+|\?)")
# The steps that a log tells, on a line or in a bar.
_STEPS = re.compile(r"step (\d+)/(\d+)|(\d+)/(\d+) \[")
_TAIL = 4096  # bytes of a log that are read for its last words


@dataclasses.dataclass(frozen=True)
class Row:
  """One run: a config and the keys that the run changes.

  Attributes:
    config: "configs/FILE.py" or "configs/FILE.py:VARIANT".
    overrides: Dotted config key -> value, as after `--config.` on the command line.
    seeds: The number of seeds that `experiments.common.seeds` trains together. 0 means one run of
      `moe_jax.train` with the seed of the config.
    apart: Whether the seeds take turns within each step (--apart) instead of being vmapped.
    router: FILE.py:NAME, a router in place of the one that the config names; "" means none.
  """

  config: str
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  seeds: int = 0
  apart: bool = False
  router: str = ""

  def arguments(self) -> list[str]:
    """Returns the flags of the program without --workdir. Equal flags mean the same run."""
    seeds = [f"--seeds={self.seeds}"] * bool(self.seeds) + ["--apart"] * self.apart
    return [
      f"--config={self.config}",
      *(f"--config.{key}={value}" for key, value in self.overrides.items()),
      *([f"--router={self.router}"] if self.router else []),
      *seeds,
    ]

  @property
  def program(self) -> tuple[str, ...]:
    """The arguments of Python that select the training program."""
    return ("-m", "experiments.common.seeds" if self.seeds else "moe_jax.train")

  def command(self, directory: pathlib.Path) -> list[str]:
    """Returns the whole command that trains the row in `directory`."""
    return ["python", *self.program, f"--workdir={directory}", *self.arguments()]

  def changed(self, values: Mapping[str, str], seeds: int | None, router: str = "") -> Row:
    """Returns the row with other values of config keys, another number of seeds, another router.

    Args:
      values: Dotted config key -> value.
      seeds: The number of seeds. None leaves the row's own.
      router: FILE.py:NAME. "" leaves the router that the config names, and a dense row has none.

    Raises:
      ConfigError: The row fixes its seed, so that a number of seeds has no meaning for it.
    """
    if seeds is not None and "seed" in self.overrides:
      raise ConfigError(
        "seeds",
        seeds,
        "each row of this study has one seed; choose rows with --only, or a seed with --set seed=N",
      )
    row = dataclasses.replace(
      self, overrides={**self.overrides, **values}, seeds=self.seeds if seeds is None else seeds
    )
    return dataclasses.replace(row, router=router) if router and row.has_experts() else row

  def has_experts(self) -> bool:
    """Returns whether a layer of the row's model has experts, which a router could serve."""
    # Imported here, because most commands of studies need no JAX.
    from moe_jax.assembly.experts import has_experts

    return any(has_experts(self.read().model))

  def shortened(self, steps: int) -> Row:
    """Returns the row with another number of steps, and a warmup that is the same share of them."""
    config = self.read()
    warmup = round(steps * config.optimizer.warmup_steps / config.train.steps)
    changes = {"train.steps": steps, "optimizer.warmup_steps": warmup}
    return dataclasses.replace(self, overrides={**self.overrides, **changes})

  def read(self) -> Config:
    """Returns the row's config with all of its overrides.

    Raises:
      ConfigError: A key does not exist or a value has the wrong type.
    """
    flags = [flag for flag in self.arguments() if flag.startswith(("--config", "--router"))]
    return parse(["", *flags], workdir=False).config

  def cost(self) -> tuple[int, float]:
    """Returns the parameters that a token activates, and the FLOPs of its forward pass."""
    # Imported here, because most commands of studies need no JAX.
    from moe_jax import accounts, assembly

    config = self.read()
    size = assembly.vocab_size(config)
    return accounts.parameter_counts(config, size)[1], accounts.flops_per_token(config, size)

  def check(self) -> None:
    """Raises ConfigError if a key does not exist or a value has the wrong type."""
    self.read()


def unfinished(rows: Mapping[str, Row], results: pathlib.Path) -> dict[str, Row]:
  """Returns the rows that have no line in `results` yet.

  Raises:
    ConfigError: A row has a line that was made with other arguments.
  """
  done = journal.load(results)
  for name in rows.keys() & done.keys():
    before, now = done[name]["arguments"], rows[name].arguments()
    if set(before) != set(now):
      raise ConfigError(
        "results",
        str(results),
        f"its row {name!r} was run {_difference(before, now)}; give the flags of before, or try "
        "changes with --set KEY=VALUE and a --workdir of their own",
      )
  return {name: row for name, row in rows.items() if name not in done}


def _difference(before: Sequence[str], now: Sequence[str]) -> str:
  """Returns in words how the arguments of before differ from those of now."""
  gone = shlex.join(argument for argument in before if argument not in now)
  new = shlex.join(argument for argument in now if argument not in before)
  if not gone:
    return f"without {new}, with which it is run now"
  return f"with {gone}, " + (f"and is now run with {new}" if new else "which is left out now")


@dataclasses.dataclass(frozen=True)
class _Running:
  """A row's process, its log, where in it this start's words begin, and when it started."""

  process: subprocess.Popen
  log: pathlib.Path
  start: int
  begun: float


def run(
  rows: Mapping[str, Row],
  results: pathlib.Path,
  workdir: pathlib.Path,
  processes: int = 1,
  program: Sequence[str] = (),
  devices: Sequence[str] = (),
  report: journal.Report = lambda name, line: None,
) -> None:
  """Trains the unfinished rows, `processes` at a time, and adds a line to `results` for each.

  A line has the row's name, its arguments and the fields of its results.json, or `diverged` if the
  loss was no longer finite. SIGTERM and Ctrl-C let the runs save before they end. A run whose
  folder exists goes on where it stopped. While rows are trained, each one's number and
  last step are shown every few seconds, with the time that the study has taken and will take.

  Args:
    rows: Name -> row. A row's name is also the name of its run's folder.
    results: The file of lines, which is created if it does not exist.
    workdir: The folder that holds the folders and the logs of the runs.
    processes: The number of rows that are trained at a time.
    program: A command that takes the flags of `moe_jax.train` and leaves the same files and exit
      codes. () means each row's own program.
    devices: Values of CUDA_VISIBLE_DEVICES. Each device trains one row at a time, and its run sees
      no other device; `processes` is then ignored. () means that every run sees all devices.
    report: Called with the name and the line of each row that ends.

  Raises:
    ConfigError: A row ended in another way: its command is wrong, or it crashed or was killed. The
      message ends with the last line of the row's log. The row has no line in `results` and runs
      again with the next command.
  """
  todo, begun = unfinished(rows, results), time.monotonic()
  places = {name: f"row {i} of {len(rows)}, {name}" for i, name in enumerate(rows, 1)}
  workdir.mkdir(parents=True, exist_ok=True)
  results.parent.mkdir(parents=True, exist_ok=True)
  running: dict[str, _Running] = {}
  stopping = threading.Event()
  free: queue.SimpleQueue[str] = queue.SimpleQueue()
  for device in devices:
    free.put(device)

  def on_a_device(name: str) -> dict[str, Any]:
    if not devices:
      return train(name, {})
    device = free.get()
    try:
      return train(name, {"CUDA_VISIBLE_DEVICES": device})
    finally:
      free.put(device)

  def train(name: str, variables: Mapping[str, str]) -> dict[str, Any]:
    directory, log_file = workdir / name, workdir / f"{name}.log"
    command = [
      *(program or (sys.executable, *rows[name].program)),
      f"--workdir={directory}",
      *rows[name].arguments(),
    ]
    tqdm.write(f"{places[name]}: training; its log is {log_file}")
    with open(log_file, "a") as log:
      # A session of its own keeps a Ctrl-C in the terminal away from the run, which is told to stop
      # by SIGTERM below.
      process = subprocess.Popen(
        command, stdout=log, stderr=log, start_new_session=True, env=os.environ | variables
      )
      running[name] = _Running(process, log_file, log.tell(), time.monotonic())
      # The study may have been stopped while the process started, too late to be in `running`.
      if stopping.is_set():
        process.terminate()
      code = process.wait()
      del running[name]
    return _line(name, rows[name], code, directory, log_file)

  previous_handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  pool = concurrent.futures.ThreadPoolExecutor(len(devices) or processes)
  try:
    futures = {pool.submit(on_a_device, name): name for name in todo}
    done = concurrent.futures.as_completed(futures)
    ended = []

    def show():
      shares = _show(running, places)
      if len(todo) > 1:
        tqdm.write(f"study: {left(time.monotonic() - begun, len(ended) + shares, len(todo))}")

    with progress.repeating(show, progress.SILENCE):
      for future in tqdm(done, total=len(rows), initial=len(rows) - len(todo), unit="run"):
        line = future.result()
        ended.append(futures[future])
        journal.append(results, line)
        report(futures[future], line)
  except BaseException:
    stopping.set()
    pool.shutdown(wait=False, cancel_futures=True)
    for each in list(running.values()):
      each.process.terminate()
    raise
  finally:
    pool.shutdown(wait=True)
    signal.signal(signal.SIGTERM, previous_handler)


def _show(running: Mapping[str, _Running], places: Mapping[str, str]) -> float:
  """Prints how far the running rows are, and returns the sum of their shares that are done."""
  shares = 0.0
  for name, each in list(running.items()):
    seconds = time.monotonic() - each.begun
    tqdm.write(f"{places[name]}: {last_words(each.log, each.start)}; {seconds:.0f} s so far")
    shares += share(each.log, each.start)
  return shares


def left(seconds: float, done: float, total: int) -> str:
  """Returns the time that has gone by and an estimate of the time that is left, in words.

  Args:
    seconds: The seconds that have gone by.
    done: The number of rows that are done, which counts the shares of those that are not.
    total: The number of all rows.
  """
  rest = (
    f"about {progress.duration(seconds / done * (total - done))} left"
    if done
    else "the rest is not known yet"
  )
  return f"{progress.duration(seconds)} so far, {rest}"


def share(log: pathlib.Path, start: int) -> float:
  """Returns the share of its steps that a run has done, by its log; see `last_words`."""
  found = _STEPS.findall(_tail(log, start))
  done, steps = [int(number) for number in found[-1] if number] if found else (0, 1)
  return done / steps if steps else 0.0


def _tail(log: pathlib.Path, start: int) -> str:
  """Returns the end of a log, without what it held before the byte `start`."""
  with open(log, "rb") as file:
    file.seek(max(start, file.seek(0, os.SEEK_END) - _TAIL))
    return file.read().decode(errors="replace")


def last_words(log: pathlib.Path, start: int) -> str:
  """Returns the last step that a log tells, or its last line, or "starting" if it is empty.

  Args:
    log: The log.
    start: The byte at which the words of the present start of the run begin.
  """
  # A bar is written again and again, with a carriage return between.
  lines = [line.strip() for line in re.split(r"[\r\n]+", _tail(log, start)) if line.strip()]
  if not lines:
    return "starting"
  bar = _BAR.search(lines[-1])
  if bar is None:
    return lines[-1]
  done, steps, left = bar.groups()
  if done == "0":
    return f"step 0/{steps}, which compiles"
  return f"step {done}/{steps}, " + ("final evaluation" if done == steps else f"{left} left")


def _line(
  name: str, row: Row, code: int, directory: pathlib.Path, log: pathlib.Path
) -> dict[str, Any]:
  """Returns the line of results of a run that ended with this exit code."""
  last_words = (log.read_text().strip().splitlines() or [""])[-1]
  line = {"row": name, "arguments": row.arguments()}
  if code == EXIT_DIVERGED:
    return line | {"diverged": last_words.removeprefix("error: ")}
  results = directory / "results.json"
  if code or not results.exists():
    raise ConfigError("row", name, f"ended with exit code {code}: {last_words}; its log is {log}")
  return line | {
    key: value for key, value in json.loads(results.read_text()).items() if key not in DROPPED
  }
