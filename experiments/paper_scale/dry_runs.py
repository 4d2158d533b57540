"""Compiles the rows: `python -m moe_jax.dryrun` in a process each, whose time and memory count."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

from tqdm import tqdm

from experiments.common import journal
from experiments.common.study import Job
from experiments.paper_scale.rows import Row
from moe_jax.training import progress

# The fields of a dry run's report that a line of results has.
KEPT = (
  "topology",
  "devices",
  "mesh",
  "mode",
  "tokens",
  "fits",
  "memory",
  "expected",
  "flops",
  "roofline",
  "exchange",
  "paper",
  "remedies",
  "versions",
)


def train(job: Job) -> None:
  """Compiles the rows that have no line yet, or a line of other arguments, one after another."""
  done = journal.load(job.results)
  todo = {
    name: row
    for name, row in job.rows.items()
    if name not in done or done[name]["arguments"] != row.arguments()
  }
  # The bar also shows the time that has gone by and an estimate of the time that is left.
  for number, (name, row) in enumerate(tqdm(todo.items(), unit="row"), 1):
    job.results.parent.mkdir(parents=True, exist_ok=True)
    with progress.working(f"row {number} of {len(todo)}, {name}", tqdm.write):
      line = dry_run(name, row, job.workdir)
    journal.append(job.results, line)
    job.report(name, line)


def dry_run(name: str, row: Row, workdir: pathlib.Path) -> dict[str, Any]:
  """Returns a row's line: the fields of its report, and what its process took.

  A row whose compiler is missing, or that does not fit, has the reason as `error`.

  Args:
    name: The row's name.
    row: The row.
    workdir: The folder that holds the report and the log of each row.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  command = [
    sys.executable,
    "-m",
    "moe_jax.dryrun",
    *row.arguments(),
    f"--workdir={workdir / name}",
  ]
  start, log = time.monotonic(), workdir / f"{name}.log"
  with open(log, "w") as out:
    process = subprocess.Popen(command, stdout=out, stderr=out)
    _, status, usage = os.wait4(process.pid, 0)
  process.returncode = os.waitstatus_to_exitcode(status)
  line = {
    "row": name,
    "arguments": row.arguments(),
    "seconds": round(time.monotonic() - start),
    "cpu_seconds": round(usage.ru_utime + usage.ru_stime),
    "resident_bytes": 1024 * usage.ru_maxrss,
  }
  last_words = (log.read_text().strip().splitlines() or [""])[-1]
  if process.returncode not in (0, 1):
    return line | {"error": last_words.removeprefix("error: ")}
  report = json.loads((workdir / name / "report.json").read_text())
  line |= {key: report[key] for key in KEPT if key in report}
  sums: dict[str, float] = {}
  for moved in report.get("collectives", ()):
    kind = f"{moved['kind']} {moved['axes']}"
    sums[kind] = sums.get(kind, 0.0) + moved["wire_bytes"]
  return (
    line
    | {"wire_bytes": sums}
    | ({} if report["fits"] else {"error": last_words.removeprefix("error: ")})
  )
