"""Injects faults into a small run one by one, and reports what happened and what was lost.

  python -m experiments reliability faults [--only=PART] [--write]

A run of twenty steps is trained whole, and a copy of it stops after ten. Each fault is injected
into a copy of the latter, which then goes on. "Same bits" means that its last weights are those of
the whole run. --only takes the rows whose names contain PART. --write puts the table into
docs/reliability.md. The exit code is 1 if a row is not as it should be.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from experiments.common.tables import replace
from experiments.reliability import breakage, small
from moe_jax.errors import ConfigError
from moe_jax.training import metrics

PAGE = small.ROOT / "docs" / "reliability.md"
SHORT = {"train__steps": 20, "optimizer__schedule": "constant"}
LONG = SHORT | {
  "train__steps": 300,
  "train__checkpoint_every": 50,
  "train__eval_every": 300,
  "optimizer__learning_rate": 4e-3,
  "train__final_eval_batches": 4,
}
GUARD = {
  "train__guard__spike_sigmas": 8.0,
  "train__guard__patience": 2,
  "train__guard__max_rollbacks": 2,
}
SKIP = {"train__guard__skip_nonfinite": True}
# The most by which the mean of the final losses may exceed that of the clean runs, relatively. Few
# runs do not suffice: a run that skips batches sees others than the clean run, and the losses of
# such small runs then differ by several percent in either direction.
CLOSE = 0.02
SEEDS = range(10)


@dataclasses.dataclass(frozen=True)
class Fault:
  """A row of the table.

  Attributes:
    name: What is wrong, in words.
    inject: Changes files of the workdir, given the lab.
    code: The right exit code.
    same_bits: Whether the run then ends as the whole one. None means that it does not end, or need
      not end so.
    words: Words that the user must be told.
    patch: A function of `breakage` that the process calls.
    changes: Config keys to change.
    fresh: Whether the run begins anew instead of going on.
  """

  name: str
  inject: Callable[[pathlib.Path, Lab], None] = lambda workdir, lab: None
  code: int = 2
  same_bits: bool | None = None
  words: str = ""
  patch: Callable[[], None] | None = None
  changes: dict[str, Any] = dataclasses.field(default_factory=dict)
  fresh: bool = False


class Lab:
  """The whole run, the run that stopped, and copies of it.

  Attributes:
    home: The folder that holds everything.
    weights: The digest of the last weights of the whole run.
  """

  def __init__(self, home: pathlib.Path):
    self.home = home
    small.write_corpus(home / "corpus")
    self.run(home / "half", train__steps=10)
    shutil.copytree(home / "half", home / "whole")
    self.run(home / "whole")
    self.weights = small.sha256(home / "whole")

  def run(
    self, workdir: pathlib.Path, patch: Callable[[], None] | None = None, **changes: Any
  ) -> tuple[int, str]:
    """Runs the command in a workdir, and returns its exit code and what it printed."""
    log = pathlib.Path(f"{workdir}.log")
    before = len(log.read_text()) if log.exists() else 0
    code = small.start(self.home, workdir, patch=patch, **SHORT | changes).wait(300)
    return (124 if code is None else code), log.read_text(errors="replace")[before:]

  @functools.cached_property
  def clean(self) -> list[float]:
    """The final bits per byte of the long runs to which nothing happens, by seed."""
    workdirs = [self.home / f"clean_{seed}" for seed in SEEDS]
    for seed, workdir in zip(SEEDS, workdirs, strict=True):
      self.run(workdir, **LONG, seed=seed)
    return [bits(workdir) for workdir in workdirs]


def bits(workdir: pathlib.Path) -> float:
  """Returns the final bits per byte of a run."""
  (value,) = json.loads((workdir / "results.json").read_text())["bits_per_byte"].values()
  return value


def flip(folder: pathlib.Path) -> None:
  """Changes one bit in the middle of the largest file below a folder."""
  file = max(
    (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
  )
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)


def newest(workdir: pathlib.Path) -> pathlib.Path:
  """Returns the newest checkpoint of a run."""
  return max(
    (path for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()),
    key=lambda p: int(p.name),
  )


def _flip_newest(workdir, lab):
  flip(newest(workdir) / "state" / "d")


def _flip_all(workdir, lab):
  for path in (workdir / "checkpoints").iterdir():
    flip(path / "state" / "d")


def _position(workdir, lab):
  file = newest(workdir) / "data" / "metadata"
  file.write_text(json.dumps(json.loads(file.read_text()) | {"batches": 2}))


def _blank_line(workdir, lab):
  file = workdir / "metrics.jsonl"
  lines = file.read_text().splitlines()
  file.write_text("\n".join([*lines[:2], "", "{broken", *lines[2:]]) + "\n")


def _temporaries(workdir, lab):
  (workdir / ".config.json.abcd.tmp").write_text("half")
  shutil.copytree(newest(workdir), workdir / "checkpoints" / "15.orbax-checkpoint-tmp")


def _damage_cache(workdir, lab):
  shutil.copytree(lab.home / "cache", lab.home / "damaged_cache", dirs_exist_ok=True)
  for file in (lab.home / "damaged_cache").glob("tokens-*"):
    file.write_bytes(b"\xff" * file.stat().st_size)


def _write(name: str, content: str | None) -> Callable[[pathlib.Path, Lab], None]:
  def inject(workdir, lab):
    path = workdir / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if content is not None:
      path.write_text(content)

  return inject


def _folder(name: str) -> Callable[[pathlib.Path, Lab], None]:
  def inject(workdir, lab):
    (workdir / name).unlink(missing_ok=True)
    (workdir / name).mkdir()

  return inject


_AGAIN = {"code": 0, "same_bits": True}
FAULTS: tuple[Fault, ...] = (
  Fault("nothing", **_AGAIN),
  Fault("validation scores are NaN from step 12 on", patch=breakage.scores_are_nan, **_AGAIN),
  Fault(
    "an update makes the weights infinite",
    patch=breakage.update_ruins_weights,
    code=3,
    fresh=True,
    words="after step 15 params/",
  ),
  Fault("NaN in one expert's gradient", patch=breakage.gradient_is_nan, code=3, words="at step 12"),
  Fault("a bit flips in the newest checkpoint", _flip_newest, words="set_aside", **_AGAIN),
  Fault("a bit flips in every checkpoint", _flip_all, words="no older one that is whole"),
  Fault(
    "the newest checkpoint has another place in the data",
    _position,
    words="its seal does not fit",
    **_AGAIN,
  ),
  Fault(
    "the newest checkpoint's state is gone",
    lambda w, lab: shutil.rmtree(newest(w) / "state"),
    words="cannot be read",
    **_AGAIN,
  ),
  Fault(
    "a blank and a broken line in metrics.jsonl", _blank_line, words="1 damaged line", **_AGAIN
  ),
  Fault("a killed process left temporaries", _temporaries, **_AGAIN),
  Fault(
    "the tokens' cache is full of 0xff",
    _damage_cache,
    changes={"data__cache_dir": "{home}/damaged_cache"},
    words="damaged",
    **_AGAIN,
  ),
  Fault("meta.json is gone", _write("meta.json", None), words="no meta.json"),
  Fault("meta.json is empty", _write("meta.json", ""), words="meta.json cannot be read"),
  Fault("meta.json is a list", _write("meta.json", "[]"), words="meta.json holds a list"),
  Fault("config.json is gone", _write("config.json", None), words="no config.json"),
  Fault(
    "config.json is nested 100,000 deep",
    _write("config.json", "[" * 100_000),
    words="nested too deeply",
  ),
  Fault(
    "config.json is not UTF-8",
    lambda w, lab: (w / "config.json").write_bytes(b"\xff\xfe{"),
    words="config.json cannot be read",
  ),
  Fault(
    "metrics.jsonl is a directory",
    _folder("metrics.jsonl"),
    words="its metrics.jsonl is a directory",
  ),
  Fault(".lock is a directory", _folder(".lock"), words="its .lock is a directory"),
  Fault("tb is a file", _write("tb", "x"), words="its tb is a file"),
  Fault("checkpoints is a file", _write("checkpoints", "x"), words="its checkpoints is a file"),
  Fault(
    "the corpus is deleted while `stream` reads it",
    code=2,
    fresh=True,
    patch=breakage.corpus_vanishes,
    changes={"data__pipeline": "stream", "data__sources": "('text:{home}/gone/*.txt',)"},
    words="gone",
    inject=lambda workdir, lab: small.write_corpus(lab.home / "gone"),
  ),
  Fault(
    "another learning rate", changes={"optimizer__learning_rate": 0.1}, words="another --workdir"
  ),
  Fault(
    "learning_rate=inf",
    changes={"optimizer__learning_rate": "inf"},
    fresh=True,
    words="at most 1e+20",
  ),
  Fault(
    "capacity_factor=inf",
    changes={"model__moe__capacity_factor": "inf"},
    fresh=True,
    words="or None",
  ),
  Fault("capacity_factor=None", changes={"model__moe__capacity_factor": "None"}, **_AGAIN),
  Fault(
    "num_layers=2147483648", changes={"model__num_layers": 2**31}, fresh=True, words="at most 1,000"
  ),
  Fault(
    "warmup_steps above steps",
    changes={"optimizer__warmup_steps": 50},
    fresh=True,
    words="warmup_steps",
  ),
  Fault("seed=2**32", changes={"seed": 2**32}, fresh=True, words="seed=4294967296"),
)


def row(fault: Fault, lab: Lab, number: int) -> dict[str, Any]:
  """Injects a fault, and returns the row's cells and whether all is as it should be."""
  workdir = lab.home / f"fault{number}"
  if not fault.fresh:
    shutil.copytree(lab.home / "half", workdir)
  fault.inject(workdir, lab)
  kept = _checkpoints(workdir)
  changes = {
    key: value.format(home=lab.home) if isinstance(value, str) else value
    for key, value in fault.changes.items()
  }
  code, printed = lab.run(workdir, fault.patch, **changes)
  told = [line for line in printed.splitlines() if line.startswith(("error:", "warning:", "note:"))]
  same = code == 0 and small.sha256(workdir) == lab.weights
  good = (
    code == fault.code
    and fault.words in " ".join(told)
    and "Traceback" not in printed
    and (fault.same_bits is None or same == fault.same_bits)
  )
  lost = _lost(workdir, kept, same, code)
  happened = {
    0: "went on" + (", same bits" if same else ""),
    2: "refused",
    3: "stopped as diverged",
  }.get(code, f"exit code {code}")
  return {
    "name": fault.name,
    "happened": happened,
    "lost": lost,
    "told": " ".join(told).replace(str(lab.home), "…"),
    "good": good,
  }


def _lost(workdir: pathlib.Path, kept: Sequence[str], same: bool, code: int) -> str:
  """Returns in words what the user no longer has."""
  if code == 0:
    lines = sum(line["kind"] == "train" for line in metrics.read(workdir / "metrics.jsonl"))
    return (
      "nothing"
      if same and lines == 10
      else f"{10 - lines} lines of metrics"
      if lines < 10
      else "nothing"
    )
  gone = sorted(set(kept) - set(_checkpoints(workdir)))
  return f"checkpoints {', '.join(gone)}" if gone else "nothing"


def _checkpoints(workdir: pathlib.Path) -> list[str]:
  """Returns the names of the checkpoints, damaged or not."""
  return sorted(path.name for path in (workdir / "checkpoints").glob("[0-9]*"))


def disk(lab: Lab) -> dict[str, Any] | None:
  """Trains on a disk that is too small for a second checkpoint, and goes on when there is room.

  Returns:
    The row's cells, or None if such a disk cannot be mounted.
  """
  place = lab.home / "disk"
  place.mkdir()

  def mount(*options):
    return subprocess.run(
      ["mount", "-t", "tmpfs", "-o", *options, "tmpfs", str(place)], capture_output=True
    ).returncode

  if mount("size=500k"):
    return None
  try:
    code, printed = lab.run(place)
    told = [line for line in printed.splitlines() if line.startswith("error:")]
    mount("remount,size=64m")
    again, _ = lab.run(place)
    same = small.sha256(place) == lab.weights
  finally:
    subprocess.run(["umount", "-l", str(place)], capture_output=True)
  good = code == 2 and again == 0 and same and len(told) == 1 and "Traceback" not in printed
  return {
    "name": "the disk is full",
    "happened": "stopped; with more room it went on, " + ("same bits" if same else "other bits"),
    "lost": "nothing" if same else "bits",
    "told": " ".join(told).replace(str(lab.home), "…"),
    "good": good,
  }


def close_to_clean(
  lab: Lab,
  name: str,
  patch: Callable[[], None],
  guard: dict[str, Any],
  twin: Callable[[], None] | None = None,
) -> dict[str, Any]:
  """Compares long runs that are broken in the middle with the clean runs of the same seeds.

  Args:
    lab: The place of the runs.
    name: The name of the row.
    patch: What breaks the runs.
    guard: The keys of the guard.
    twin: What makes an unbroken run read the same batches, for a guard that skips some. The broken
      runs must then end with the bits of these runs: a comparison with the clean runs alone could
      not tell a fault from the luck of other batches.
  """
  told, values, same = [], [], []
  for seed in SEEDS:
    workdir = lab.home / f"{name.replace(' ', '_')}_{seed}"
    code, printed = lab.run(workdir, patch, **LONG | guard, seed=seed)
    values.append(bits(workdir) if code == 0 else float("nan"))
    told.append(
      [
        line.removeprefix("warning: ")
        for line in printed.splitlines()
        if line.startswith(("warning:", "error:"))
      ]
    )
    if twin is not None:
      other = pathlib.Path(f"{workdir}_twin")
      lab.run(other, twin, **LONG, seed=seed)
      same.append(code == 0 and small.sha256(workdir) == small.sha256(other))
  # A single difference may be below 0, because the two runs have not seen the same batches.
  differences = [value / clean - 1 for value, clean in zip(values, lab.clean, strict=True)]
  mean = sum(differences) / len(differences)
  error = statistics.stdev(differences) / len(differences) ** 0.5
  words = (
    f"{mean:+.1%} bits per byte against the clean runs, the mean of {len(SEEDS)} seeds with a "
    f"standard error of {error:.1%} "
    f"({', '.join(f'{difference:+.1%}' for difference in differences)})"
  )
  if twin is not None:
    words = (
      f"same bits as a run that never reads the skipped batches and the poison, in {sum(same)} of "
      f"{len(same)} seeds; {words}"
    )
  return {
    "name": name,
    "happened": words,
    "lost": "nothing",
    "told": " ".join(told[0]).replace(str(lab.home), "…"),
    "good": all(told) and mean <= CLOSE and (twin is None or all(same)),
  }


def table(rows: Sequence[dict[str, Any]]) -> str:
  """Returns a Markdown table with a row for each fault."""
  lines = [
    "| fault | what happened | what was lost | what the user was told |",
    "|---|---|---|---|",
  ]
  for one in rows:
    mark = "" if one["good"] else " **(not as it should be)**"
    lines.append(
      f"| {one['name']}{mark} | {one['happened']} | {one['lost']} | {_shortened(one['told'])} |"
    )
  good = sum(one["good"] for one in rows)
  return "\n".join([*lines, "", f"{good} of {len(rows)} rows are as they should be."])


def _shortened(text: str, most: int = 420) -> str:
  text = text.replace("|", "\\|").replace("<", "&lt;")
  return text if len(text) <= most else text[:most] + " …"


def flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of the verb."""
  parser.add_argument("--only", default="", help="only the rows whose names contain this")
  parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")


def action(options: argparse.Namespace) -> int:
  """Does what the command line says and returns the exit code."""
  if options.only and options.write:
    raise ConfigError(
      "write", True, "would put a part of the rows into the table; leave out --only"
    )
  jobs: dict[str, Callable[[Lab], dict[str, Any] | None]] = {
    fault.name: functools.partial(row, fault, number=number) for number, fault in enumerate(FAULTS)
  }
  jobs["the disk is full"] = disk
  for name, patch, changes, twin in (
    (
      "NaN in one expert's gradient at step 200 of 300, skipped",
      breakage.late_gradient_is_nan,
      SKIP,
      None,
    ),
    (
      "four poisoned batches at step 200 of 300, rolled back",
      breakage.batches_are_garbage,
      GUARD,
      breakage.batches_are_absent,
    ),
  ):
    jobs[name] = functools.partial(close_to_clean, name=name, patch=patch, guard=changes, twin=twin)
  chosen = [job for name, job in jobs.items() if options.only in name]
  if not chosen:
    raise ConfigError(
      "only", options.only, "is in the name of no row; docs/reliability.md lists the names"
    )
  with tempfile.TemporaryDirectory() as folder:
    lab = Lab(pathlib.Path(folder))
    rows = [found for job in tqdm(chosen, unit="fault") if (found := job(lab)) is not None]
  text = table(rows)
  print(text)
  if options.write:
    PAGE.write_text(replace(PAGE.read_text(), "faults", text))
  return int(not all(one["good"] for one in rows))
