"""Whether the tests notice a change: each is put into a copy of the repository, whose tests run in a fork."""

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

from tqdm import tqdm

from experiments.mutation.operators import Mutant, source

ROOT = pathlib.Path(__file__).resolve().parents[2]
NEEDED = ("moe_jax", "tests", "configs", "experiments", "docs", "pyproject.toml", "README.md", "setup.py")
LIMIT = 600.0  # seconds a mutant; one that takes longer hangs, which a test notices
ENVIRONMENT = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
               "PYTHONDONTWRITEBYTECODE": "1"}


@dataclasses.dataclass(frozen=True)
class Judge:
  """A file of tests: how long it takes and which lines of which files of the package it executes."""

  path: str
  seconds: float
  lines: Mapping[str, frozenset[int]]


def run(chosen: Sequence[Mutant], files: Sequence[str], processes: int,
        out: pathlib.Path | None) -> dict[Mutant, str]:
  """Returns for each mutant the one of these files of tests that noticed it, or an empty string."""
  with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home, concurrent.futures.ProcessPoolExecutor(
      processes, multiprocessing.get_context("spawn"), _start, (home,)) as pool:
    judges = list(tqdm(pool.map(_measured, files), total=len(files), unit="file", desc="unchanged"))
    jobs = {pool.submit(_judged, mutant, _order(mutant, judges)): mutant for mutant in chosen}
    verdicts = {}
    with tqdm(total=len(jobs), unit="mutant") as bar, out.open("w") if out else contextlib.nullcontext() as lines:
      for job in concurrent.futures.as_completed(jobs):
        mutant = jobs[job]
        verdicts[mutant] = job.result()
        bar.update()
        bar.set_postfix(survived=sum(not by for by in verdicts.values()))
        if not verdicts[mutant]:
          tqdm.write(f"survived: {mutant}")
        if lines:
          lines.write(json.dumps(dataclasses.asdict(mutant) | {"noticed by": verdicts[mutant]}) + "\n")
          lines.flush()
  return {mutant: verdicts[mutant] for mutant in chosen}


def _order(mutant: Mutant, judges: Iterable[Judge]) -> list[str]:
  """Returns the tests that execute the changed line: the module's own, its folder's, then others; fast ones first."""
  place = pathlib.PurePath(mutant.path)
  rank = lambda judge: (pathlib.PurePath(judge.path).stem != f"{place.stem}_test",
                        pathlib.PurePath(judge.path).parent.name != place.parent.name, judge.seconds)
  # A change of a multi-line statement is noted at its first line, which Python may not count as executed: 3 lines.
  near = set(range(mutant.line - 1, mutant.line + 2))
  return [judge.path for judge in sorted(judges, key=rank) if near & judge.lines.get(mutant.path, frozenset())]


def _start(home: str) -> None:
  """Prepares a process: its copy of the repository, and all that is imported before the package itself."""
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
  import pytest  # noqa: F401


def _measured(path: str) -> Judge:
  """Runs a file of tests on the unchanged package."""
  result, begun = _tree / "lines.json", time.monotonic()
  code = _forked([path], LIMIT, result)
  if code not in (0, 5):  # 5: none is chosen
    raise RuntimeError(f"{path} fails though nothing was changed: {(_tree / 'said').read_text()[-2000:]}")
  lines = {name: frozenset(numbers) for name, numbers in json.loads(result.read_text()).items()}
  return Judge(path, time.monotonic() - begun, lines)


def _judged(mutant: Mutant, paths: Sequence[str]) -> str:
  """Returns the file of tests that notices the change, or an empty string."""
  file = _tree / mutant.path
  kept = file.read_text()
  try:
    file.write_text(source(ROOT, mutant))
    begun = time.monotonic()
    for path in paths:
      code = _forked([path], max(LIMIT - (time.monotonic() - begun), 1.0))
      if code not in (0, 5):
        return path
    return ""
  finally:
    file.write_text(kept)


def _forked(paths: Sequence[str], limit: float, lines: pathlib.Path | None = None) -> int:
  """Returns pytest's exit code from a child of this process, or -1 if it took longer than `limit` seconds."""
  child = os.fork()
  if not child:
    code = 70
    try:
      os.setsid()
      said = os.open(_tree / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
      os.dup2(said, 1)
      os.dup2(said, 2)
      code = _tests(paths, lines)
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


def _tests(paths: Sequence[str], lines: pathlib.Path | None) -> int:
  import pytest
  os.chdir(_tree)
  # The package is imported from the copy, wherever this process found this module.
  sys.path[:] = [str(_tree), *(place for place in sys.path if place not in ("", str(ROOT)))]
  for name in [name for name in sys.modules if name.split(".")[0] in ("moe_jax", "experiments", "configs")]:
    del sys.modules[name]
  sys.argv = ["pytest"]
  os.environ["PYTHONPATH"] = str(_tree)
  measure = None
  if lines:
    import coverage
    measure = coverage.Coverage(source=[str(_tree / "moe_jax")], data_file=None)
    measure.start()
  code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *paths])
  if measure:
    measure.stop()
    data = measure.get_data()
    lines.write_text(json.dumps({str(pathlib.Path(file).relative_to(_tree)): data.lines(file)
                                 for file in data.measured_files()}))
  return int(code)
