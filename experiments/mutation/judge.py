"""Finds out whether the tests notice a change.

Each change is put into a copy of the repository, whose tests run in a fork of this process.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence

import coverage
import pytest
from tqdm import tqdm

from experiments.mutation.operators import Mutant, source

ROOT = pathlib.Path(__file__).resolve().parents[2]
NEEDED = (
  "moe_jax",
  "tests",
  "configs",
  "experiments",
  "docs",
  "pyproject.toml",
  "CONTRIBUTING.md",
  "Makefile",
  "README.md",
  "setup.py",
)
# Tests that take this many times as long as without the change, and a minute more, hang. A hang
# counts as noticed.
SLOWER = 10.0
ENVIRONMENT = {
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  "PYTHONDONTWRITEBYTECODE": "1",
}


@dataclasses.dataclass(frozen=True)
class Judge:
  """A test that may notice a change.

  Attributes:
    name: The name of the test, as pytest has it.
    seconds: The time that it takes.
    lines: File of the package -> the lines that the test executes.
  """

  name: str
  seconds: float
  lines: Mapping[str, frozenset[int]]

  @property
  def path(self) -> str:
    """The path of the file of the test."""
    return self.name.partition("::")[0]


def run(
  chosen: Sequence[Mutant],
  files: Sequence[str],
  processes: int,
  seconds: float,
  out: pathlib.Path | None,
) -> dict[Mutant, str]:
  """Returns for each mutant the test that noticed it, or an empty string.

  Args:
    chosen: The mutants.
    files: The files of tests, all of which run on the unchanged package first.
    processes: The number of mutants at a time.
    seconds: The time that the tests of a mutant may take besides those of its module's own file.
    out: A file that gets a line of JSON for each mutant. None means that there is no such file.
  """
  with (
    tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home,
    concurrent.futures.ProcessPoolExecutor(
      processes, multiprocessing.get_context("spawn"), _start, (home,)
    ) as pool,
  ):
    measured = tqdm(pool.map(_measured, files), total=len(files), unit="file", desc="unchanged")
    judges = [judge for of_file in measured for judge in of_file]
    jobs = {
      pool.submit(_judged, mutant, *_order(mutant, judges, seconds)): mutant for mutant in chosen
    }
    verdicts = {}
    with (
      tqdm(total=len(jobs), unit="mutant") as bar,
      out.open("w") if out else contextlib.nullcontext() as lines,
    ):
      for job in concurrent.futures.as_completed(jobs):
        mutant = jobs[job]
        verdicts[mutant] = job.result()
        bar.update()
        bar.set_postfix(survived=sum(not by for by in verdicts.values()))
        if not verdicts[mutant]:
          tqdm.write(f"survived: {mutant}")
        if lines:
          lines.write(
            json.dumps(dataclasses.asdict(mutant) | {"noticed by": verdicts[mutant]}) + "\n"
          )
          lines.flush()
  return {mutant: verdicts[mutant] for mutant in chosen}


def _order(
  mutant: Mutant, judges: Iterable[Judge], seconds: float
) -> tuple[list[Judge], list[Judge]]:
  """Returns the tests that execute the changed line.

  Returns:
    The tests of the module's own file, and the fastest of the others.
  """
  place = pathlib.PurePath(mutant.path)
  # A change of a multi-line statement is noted at its first line, which Python may not count as
  # executed. So a test of a line nearby counts, too.
  near = set(range(mutant.line - 1, mutant.line + 2))
  of_file = [judge for judge in judges if mutant.path in judge.lines]
  # No test executes what runs when the module is imported, such as a default, and it concerns all
  # tests of the module.
  candidates = [judge for judge in of_file if near & judge.lines[mutant.path]] or of_file
  candidates = sorted(candidates, key=lambda judge: judge.seconds)
  own_file = f"{place.stem}_test"
  own = [judge for judge in candidates if pathlib.PurePath(judge.path).stem == own_file]
  others, left = [], seconds
  for judge in candidates:
    if judge not in own and judge.seconds <= left:
      others.append(judge)
      left -= judge.seconds
  return own, others


def _start(home: str) -> None:
  """Prepares a process: makes its copy of the repository, and imports the libraries."""
  global _tree
  _tree = pathlib.Path(home) / str(os.getpid())
  os.environ.update(ENVIRONMENT, JAX_COMPILATION_CACHE_DIR=f"{home}/compiled", JAX_PLATFORMS="cpu")
  for name in NEEDED:
    if (ROOT / name).is_dir():
      shutil.copytree(ROOT / name, _tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    else:
      shutil.copy(ROOT / name, _tree / name)
  import flax.linen  # noqa: F401 - children are forked, and find these imported
  import hypothesis  # noqa: F401
  import optax  # noqa: F401
  import orbax.checkpoint  # noqa: F401


def _measured(path: str) -> list[Judge]:
  """Runs a file of tests on the unchanged package."""
  code = _forked([path], 1800.0, measure=True)
  if code not in (0, 5):  # 5 means that no test was selected
    raise RuntimeError(
      f"{path} fails though nothing was changed: {(_tree / 'output').read_text()[-2000:]}"
    )
  return [
    Judge(name, seconds, {file: frozenset(numbers) for file, numbers in lines.items()})
    for name, seconds, lines in json.loads((_tree / "judges.json").read_text())
  ]


def _judged(mutant: Mutant, own: Sequence[Judge], others: Sequence[Judge]) -> str:
  """Returns the test that notices the change, or an empty string."""
  file = _tree / mutant.path
  kept = file.read_text()
  try:
    file.write_text(source(ROOT, mutant))
    for judges in filter(None, (own, others)):
      limit = 60.0 + SLOWER * sum(judge.seconds for judge in judges)
      if _forked([judge.name for judge in judges], limit):
        failed = (_tree / "failed").read_text() if (_tree / "failed").exists() else ""
        return failed or f"{judges[0].path} (no test ended)"
    return ""
  finally:
    file.write_text(kept)


def _forked(tests: Sequence[str], limit: float, measure: bool = False) -> int:
  """Runs tests in a child of this process.

  Returns:
    The exit code of pytest, or -1 if it took longer than `limit` seconds.
  """
  (_tree / "failed").unlink(missing_ok=True)
  child = os.fork()
  if not child:
    code = 70
    try:
      os.setsid()
      output = os.open(_tree / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
      os.dup2(output, 1)
      os.dup2(output, 2)
      code = _tests(tests, measure)
    except BaseException:
      traceback.print_exc()
    finally:
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(code)
  end = time.monotonic() + limit
  while time.monotonic() < end:
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
      return os.waitstatus_to_exitcode(status)
    time.sleep(0.02)
  os.killpg(child, signal.SIGKILL)
  os.waitpid(child, 0)
  return -1


def _tests(tests: Sequence[str], measure: bool) -> int:
  os.chdir(_tree)
  # The package is imported from the copy, wherever this process found this module.
  sys.path[:] = [str(_tree), *(place for place in sys.path if place not in ("", str(ROOT)))]
  for name in [
    name for name in sys.modules if name.split(".")[0] in ("moe_jax", "experiments", "configs")
  ]:
    del sys.modules[name]
  sys.argv = ["pytest"]
  os.environ["PYTHONPATH"] = str(_tree)
  plugin = _Measure() if measure else _Watch(tests)
  code = pytest.main(
    ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests], plugins=[plugin]
  )
  if measure:
    (_tree / "judges.json").write_text(json.dumps(plugin.judges()))
  return int(code)


class _Watch:
  """A plug-in of pytest that runs the tests in the given order and notes which one fails."""

  def __init__(self, tests: Sequence[str]):
    self._rank = {test: number for number, test in enumerate(tests)}

  def pytest_collection_finish(self, session):
    session.items.sort(key=lambda item: self._rank.get(item.nodeid, 0))

  def pytest_runtest_logreport(self, report):
    if report.failed:
      (_tree / "failed").write_text(report.nodeid)

  def pytest_collectreport(self, report):
    if report.failed:
      (_tree / "failed").write_text(f"{report.nodeid} (not imported)")


class _Measure:
  """A plug-in of pytest that notes how long each test takes and which lines it executes."""

  def __init__(self):
    self._coverage = coverage.Coverage(source=[str(_tree / "moe_jax")], data_file=None)
    self._coverage.start()
    self._seconds: dict[str, float] = {}

  @pytest.hookimpl(wrapper=True)
  def pytest_runtest_protocol(self, item, nextitem):
    import jax

    # What an earlier test has traced must be traced again, because otherwise this test would not
    # execute those lines.
    jax.clear_caches()
    self._coverage.switch_context(item.nodeid)
    begun = time.monotonic()
    done = yield
    self._seconds[item.nodeid] = time.monotonic() - begun
    return done

  def judges(self) -> list[tuple[str, float, dict[str, list[int]]]]:
    """Returns the name, the seconds and the lines by file of each test."""
    self._coverage.stop()
    data, lines = self._coverage.get_data(), {name: {} for name in self._seconds}
    for file in data.measured_files():
      for line, contexts in data.contexts_by_lineno(file).items():
        for name in filter(lines.__contains__, contexts):
          lines[name].setdefault(str(pathlib.Path(file).relative_to(_tree)), []).append(line)
    return [(name, seconds, lines[name]) for name, seconds in self._seconds.items()]
