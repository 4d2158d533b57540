"""The runner of studies: rows of configs, each trained by a command of its own, with one
results.jsonl.

A study's own module says its rows and calls `main`:

  python -m experiments.STUDY                   trains what is not finished; the same command goes
                                                on after a kill
  python -m experiments.STUDY --print           prints each row's command, for a pod or a queue
  python -m experiments.STUDY --only=A,B        only the rows whose names contain A or B
  python -m experiments.STUDY --processes=N     N rows at a time (default 1)
  python -m experiments.STUDY --devices=0,1,2   a row at a time on each of these GPUs
  python -m experiments.STUDY --workdir=DIR     where the runs live (default runs/STUDY)
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import queue
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from moe_jax.errors import EXIT_DIVERGED, ConfigError

DROPPED = (
  "sample",
  "command",
  "compare",
  "ladder",
)  # of results.json: long, or said elsewhere in the line


@dataclasses.dataclass(frozen=True)
class Row:
  """One run: a config and what it changes.

  Attributes:
    config: "configs/FILE.py" or "configs/FILE.py:VARIANT".
    overrides: dotted key -> value, as after `--config.` on the command line.
    seeds: how many are trained together by `experiments.common.seeds`; 0: the config's, by
      `moe_jax.train`.
    apart: the seeds take turns in each step, with --apart.
  """

  config: str
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  seeds: int = 0
  apart: bool = False

  def arguments(self) -> list[str]:
    """Of the program, without the workdir: what makes two runs the same."""
    seeds = [f"--seeds={self.seeds}"] * bool(self.seeds) + ["--apart"] * self.apart
    return [
      f"--config={self.config}",
      *(f"--config.{key}={value}" for key, value in self.overrides.items()),
      *seeds,
    ]

  @property
  def program(self) -> tuple[str, ...]:
    """What trains it: a Python's arguments."""
    return ("-m", "experiments.common.seeds" if self.seeds else "moe_jax.train")


def load(results: pathlib.Path) -> dict[str, dict[str, Any]]:
  """row -> its line of results.jsonl; a last line that a kill cut short is left out."""
  lines = results.read_text().splitlines() if results.exists() else []
  found = {}
  for number, line in enumerate(lines, 1):
    try:
      entry = json.loads(line)
    except json.JSONDecodeError as error:
      if number == len(lines):
        break
      raise ConfigError(
        "results", f"{results}:{number}", "is no line of JSON; remove it, and its row runs again"
      ) from error
    found[entry["row"]] = entry
  return found


def unfinished(rows: Mapping[str, Row], results: pathlib.Path) -> dict[str, Row]:
  """The rows that have no line yet.

  Raises:
    ConfigError: a row has a line of other arguments.
  """
  done = load(results)
  for name in rows.keys() & done.keys():
    if done[name]["arguments"] != rows[name].arguments():
      raise ConfigError(
        "results",
        str(results),
        f"its row {name!r} was run with {shlex.join(done[name]['arguments'])}"
        f", and is now {shlex.join(rows[name].arguments())}; remove the line to run it again",
      )
  return {name: row for name, row in rows.items() if name not in done}


def run(
  rows: Mapping[str, Row],
  results: pathlib.Path,
  workdir: pathlib.Path,
  processes: int = 1,
  program: Sequence[str] = (),
  devices: Sequence[str] = (),
) -> None:
  """Trains the unfinished rows, `processes` at a time; each that ends adds a line to `results`.

  A line has the row's name, its arguments and what its results.json says, or `diverged` where the
  loss was no longer finite. SIGTERM and Ctrl-C let the runs save before they end; a workdir that is
  there goes on where it stopped.

  Args:
    rows: name -> row; a name is also that of the run's folder.
    results: the file of lines, created where there is none.
    workdir: where the folders and logs of the runs are.
    processes: rows at a time.
    program: takes the flags of `moe_jax.train` and leaves its files and exit codes; () = each row's
      own.
    devices: as in CUDA_VISIBLE_DEVICES; each trains a row at a time and sees no other, whatever
      `processes` says. () = every run sees all.

  Raises:
    ConfigError: a row ended otherwise: its command is wrong, in the words of `moe_jax.train`, or it
      crashed or was killed. It has no line, and runs again with the next command.
  """
  todo = unfinished(rows, results)
  workdir.mkdir(parents=True, exist_ok=True)
  results.parent.mkdir(parents=True, exist_ok=True)
  running: set[subprocess.Popen] = set()
  stopping = threading.Event()
  free: queue.SimpleQueue[str] = queue.SimpleQueue()
  for device in devices:
    free.put(device)

  def one(name: str) -> dict[str, Any]:
    device = free.get() if devices else None
    try:
      return train(name, {} if device is None else {"CUDA_VISIBLE_DEVICES": device})
    finally:
      if device is not None:
        free.put(device)

  def train(name: str, variables: Mapping[str, str]) -> dict[str, Any]:
    directory = workdir / name
    command = [
      *(program or (sys.executable, *rows[name].program)),
      f"--workdir={directory}",
      *rows[name].arguments(),
    ]
    with open(workdir / f"{name}.log", "a") as log:
      process = subprocess.Popen(
        command, stdout=log, stderr=log, start_new_session=True, env=os.environ | variables
      )
      running.add(process)
      if stopping.is_set():
        process.terminate()
      code = process.wait()
      running.discard(process)
    return _line(name, rows[name], code, directory, workdir / f"{name}.log")

  previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  pool = concurrent.futures.ThreadPoolExecutor(len(devices) or processes)
  try:
    futures = [pool.submit(one, name) for name in todo]
    done = concurrent.futures.as_completed(futures)
    for future in tqdm(done, total=len(rows), initial=len(rows) - len(todo), unit="run"):
      append(results, future.result())
  except BaseException:
    stopping.set()
    pool.shutdown(wait=False, cancel_futures=True)
    for process in list(running):
      process.terminate()
    raise
  finally:
    pool.shutdown(wait=True)
    signal.signal(signal.SIGTERM, previous)


def _line(
  name: str, row: Row, code: int, directory: pathlib.Path, log: pathlib.Path
) -> dict[str, Any]:
  """What results.jsonl says of a run that ended with this exit code."""
  said = (log.read_text().strip().splitlines() or [""])[-1]
  line = {"row": name, "arguments": row.arguments()}
  if code == EXIT_DIVERGED:
    return line | {"diverged": said.removeprefix("error: ")}
  found = directory / "results.json"
  if code or not found.exists():
    raise ConfigError("row", name, f"ended with exit code {code}: {said}; its log is {log}")
  return line | {
    key: value for key, value in json.loads(found.read_text()).items() if key not in DROPPED
  }


def append(results: pathlib.Path, line: Mapping[str, Any]) -> None:
  """Adds a line, whole or not at all as far as a reader can tell."""
  text = results.read_text() if results.exists() else ""
  whole = text[: text.rfind("\n") + 1]  # a line that a kill cut short goes
  partial = results.with_suffix(".partial")
  partial.write_text(whole + json.dumps(line) + "\n")
  os.replace(partial, results)


def main(
  argv: Sequence[str], rows: Mapping[str, Row], folder: pathlib.Path, file: str = "results.jsonl"
) -> int:
  """The command line of a study whose lines of results are in `file` of `folder`; returns the exit
  code."""
  parser = argparse.ArgumentParser(prog=f"python -m experiments.{folder.name}")
  parser.add_argument(
    "--print", action="store_true", help="print each row's command and run nothing"
  )
  parser.add_argument("--only", default="", help="comma-separated parts of rows' names")
  parser.add_argument("--processes", type=int, default=1, help="rows at a time")
  parser.add_argument(
    "--devices", default="", help="comma-separated GPUs, each of which trains a row at a time"
  )
  parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs") / folder.name)
  given = parser.parse_args(argv)
  chosen = {
    name: row for name, row in rows.items() if any(part in name for part in given.only.split(","))
  }
  try:
    if not chosen:
      raise ConfigError("only", given.only, f"is in no row's name; rows: {', '.join(rows)}")
    if given.print:
      print(
        "\n".join(
          shlex.join(
            ["python", *row.program, f"--workdir={given.workdir / name}", *row.arguments()]
          )
          for name, row in chosen.items()
        )
      )
    else:
      run(
        chosen,
        folder / file,
        given.workdir,
        given.processes,
        devices=[device for device in given.devices.split(",") if device],
      )
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("stopped; the runs have saved, and the same command goes on from there", file=sys.stderr)
    return 130
  return 0
