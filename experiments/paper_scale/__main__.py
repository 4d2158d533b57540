"""Do the papers' models fit machines of the papers' size, and what would bind? The answers are
docs/paper_scale.md.

  python -m experiments.paper_scale               dry runs of rows that are not there, then the
                                                  page: make paper-scale
  python -m experiments.paper_scale --only=A,B    only rows whose names contain A or B, those that
                                                  are there again
  python -m experiments.paper_scale --full        with the compilers' full optimisation: minutes a
                                                  row instead of one
  python -m experiments.paper_scale --print       the commands
  python -m experiments.paper_scale --write       the page from results.jsonl

A row is `python -m moe_jax.dryrun` in a process of its own, whose time and memory count. It needs
the compilers: pip install -e '.[dryrun]', and for GPUs what that command asks for. A row of a
machine whose compiler is missing, or that does not fit, ends with its reason in the page.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shlex
import subprocess
import sys
import time
from typing import Any

from tqdm import tqdm

from experiments.common import sweep
from experiments.paper_scale import page
from experiments.paper_scale.rows import ROWS, Row
from moe_jax.errors import ConfigError
from moe_jax.train import guarded

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "results.jsonl"
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
)  # of a report


def dry_run(name: str, row: Row, workdir: pathlib.Path, fast: bool) -> dict[str, Any]:
  """A row's line: what its report says, and the seconds and bytes that its process took."""
  workdir.mkdir(parents=True, exist_ok=True)
  command = [
    sys.executable,
    "-m",
    "moe_jax.dryrun",
    *row.arguments(fast),
    f"--workdir={workdir / name}",
  ]
  start, log = time.monotonic(), workdir / f"{name}.log"
  with open(log, "w") as out:
    process = subprocess.Popen(command, stdout=out, stderr=out)
    _, status, used = os.wait4(process.pid, 0)
  process.returncode = os.waitstatus_to_exitcode(status)
  line = {
    "row": name,
    "arguments": row.arguments(fast),
    "seconds": round(time.monotonic() - start),
    "cpu_seconds": round(used.ru_utime + used.ru_stime),
    "resident_bytes": 1024 * used.ru_maxrss,
  }
  said = (log.read_text().strip().splitlines() or [""])[-1]
  if process.returncode not in (0, 1):
    return line | {"error": said.removeprefix("error: ")}
  report = json.loads((workdir / name / "report.json").read_text())
  line |= {key: report[key] for key in KEPT if key in report}
  sums: dict[str, float] = {}
  for moved in report.get("collectives", ()):
    kind = f"{moved['kind']} {moved['axes']}"
    sums[kind] = sums.get(kind, 0.0) + moved["wire_bytes"]
  return (
    line
    | {"wire_bytes": sums}
    | ({} if report["fits"] else {"error": said.removeprefix("error: ")})
  )


def main(argv: list[str]) -> int:
  """Returns the exit code: 0 all rows fit, 1 some do not, 2 the command is wrong."""
  parser = argparse.ArgumentParser(
    prog="python -m experiments.paper_scale", description=__doc__.split("\n")[0]
  )
  parser.add_argument(
    "--only", default="", help="rows whose names contain one of these, between commas"
  )
  parser.add_argument("--full", action="store_true", help="the compilers' full optimisation")
  parser.add_argument("--print", action="store_true", help="the commands, and nothing else")
  parser.add_argument(
    "--write", action="store_true", help="docs/paper_scale.md from results.jsonl, and nothing else"
  )
  parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/paper_scale"))
  given = parser.parse_args(argv)
  chosen = {
    name: row for name, row in ROWS.items() if any(part in name for part in given.only.split(","))
  }
  try:
    if not chosen:
      raise ConfigError("only", given.only, f"is in no row's name; rows: {', '.join(ROWS)}")
    if given.print:
      print(
        "\n".join(
          shlex.join(["python", "-m", "moe_jax.dryrun", *row.arguments(not given.full)])
          for row in chosen.values()
        )
      )
      return 0
    if not given.write:
      done = sweep.load(RESULTS)
      todo = {
        name: row
        for name, row in chosen.items()
        if given.only
        or name not in done
        or done[name]["arguments"] != row.arguments(not given.full)
      }
      for name, row in (bar := tqdm(todo.items(), unit="row")):
        bar.set_description(name)
        sweep.append(RESULTS, dry_run(name, row, given.workdir, not given.full))
    done = sweep.load(RESULTS)
    page.write({name: done[name] for name in ROWS if name in done})
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  wrong = {name: done[name]["error"] for name in chosen if name in done and "error" in done[name]}
  for name, words in wrong.items():
    print(f"{name}: {words}", file=sys.stderr)
  print(page.FILE)
  return int(bool(wrong))


if __name__ == "__main__":
  sys.exit(guarded(sys.argv, None, lambda argv: main(argv[1:])))
