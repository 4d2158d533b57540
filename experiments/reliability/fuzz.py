"""Random bad input: mutated configs, command lines and files of a run must end in a sentence or
change nothing.

  python -m experiments.reliability.fuzz [--configs=N] [--files=N] [--seed=S]   e.g. --configs=2000
    --files=500
  python -m experiments.reliability.fuzz --seed=S --case=KIND:NUMBER            one case again, and
    all that it said

Half of N configs are configs, half are command lines. A config is validated and its model traced;
some command lines train two steps. A file is one of a run that has stopped after four steps, which
then goes on for two. Prints one table, and writes it into docs/reliability.md with --write. Exit
code 1: there is a finding.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from experiments.common.command_line import check_counts, check_folder
from experiments.common.tables import replace
from experiments.reliability import cases, workers
from moe_jax.errors import ConfigError

LIMITS = {
  "config": 30.0,
  "command": 90.0,
  "file": 60.0,
}  # seconds a case; of the latter two some compile programs
PROCESSES = 2
ROOT = pathlib.Path(__file__).resolve().parents[2]
KINDS = {"config": "configs", "command": "command lines", "file": "files of a run"}


def flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of the verb."""
  parser.add_argument(
    "--configs", type=int, default=2000, help="mutated configs and command lines (%(default)s)"
  )
  parser.add_argument("--files", type=int, default=500, help="mutated files (%(default)s)")
  parser.add_argument(
    "--seed", type=int, help="of the mutations; drawn and printed if it is not given"
  )
  parser.add_argument("--case", help="KIND:NUMBER of one case, with its --seed")
  parser.add_argument("--out", type=pathlib.Path, help="a JSONL file for all cases")
  parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")


def action(given: argparse.Namespace) -> int:
  """Does what the command line says and returns the exit code."""
  check_counts(given, configs=0, files=0)
  check_folder("out", given.out)
  kind, _, number = (given.case or "config:0").partition(":")
  if kind not in KINDS or not number.isdecimal():
    raise ConfigError(
      "case", given.case, f"must be KIND:NUMBER, and KIND one of {', '.join(KINDS)}"
    )
  if given.case and given.write:
    raise ConfigError("write", True, "would put one case into the table; leave out --case")
  seed = random.SystemRandom().randrange(2**32) if given.seed is None else given.seed
  print(f"seed {seed}", flush=True)
  numbers = {
    "config": given.configs - given.configs // 2,
    "command": given.configs // 2,
    "file": given.files,
  }
  asked = [(kind, number) for kind, count in numbers.items() for number in range(count)]
  if given.case:
    asked = [(kind, int(number))]
  begun = time.monotonic()
  found = fuzz(asked, seed)
  text = table(found, seed, time.monotonic() - begun)
  print(text, *findings(found, seed), sep="\n")
  if given.case:
    print(json.dumps(found[0], indent=1))
  if given.out:
    given.out.write_text("".join(json.dumps(one) + "\n" for one in found))
  if given.write:
    page = ROOT / "docs" / "reliability.md"
    page.write_text(replace(page.read_text(), "fuzz", text))
  return int(any(one["outcome"] in cases.FINDINGS for one in found))


def fuzz(asked: Sequence[tuple[str, int]], seed: int) -> list[dict[str, Any]]:
  """What became of each case, in order: see `cases.run`."""
  found = []
  with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
    home = pathlib.Path(folder)
    prepared = list(
      workers.work(cases.prepare_in, [(home,)], lambda _: 300.0, 1, home / "compiled")
    )
    if prepared[0][1] != "ready":
      raise RuntimeError(f"the run whose files are mutated was not trained: {prepared[0][1]}")
    arguments = [(kind, number, seed, home) for kind, number in asked]

    def limit(case):
      return LIMITS[case[0]]

    for (kind, number, *_), result in tqdm(
      workers.work(cases.run, arguments, limit, PROCESSES, home / "compiled"),
      total=len(arguments),
      unit="case",
      disable=None,
    ):
      doing = cases.doing(home, kind, number)
      found.append(
        result
        or {
          "kind": kind,
          "number": number,
          "outcome": "hang",
          "what": doing.read_text() if doing.exists() else "before it began",
          "said": f"no answer within {LIMITS[kind]:g} seconds, or the process died",
        }
      )
  return sorted(found, key=lambda one: (list(KINDS).index(one["kind"]), one["number"]))


def table(found: Sequence[Mapping[str, Any]], seed: int, seconds: float) -> str:
  """Markdown: a row a kind of input, a column an outcome."""
  rows = {words: [one for one in found if one["kind"] == kind] for kind, words in KINDS.items()}
  rows["of these trained for two steps"] = [
    one for one in found if one["what"].endswith("(trained)")
  ]
  lines = [
    "| mutated | cases | " + " | ".join(cases.OUTCOMES) + " |",
    "|---" * (len(cases.OUTCOMES) + 2) + "|",
  ]
  for words, chosen in rows.items():
    counts = collections.Counter(one["outcome"] for one in chosen)
    lines.append(
      f"| {words} | {len(chosen):,} | "
      + " | ".join(f"{counts[name]:,}" for name in cases.OUTCOMES)
      + " |"
    )
  return "\n".join(
    [*lines, "", f"Seed {seed}, {seconds / 60:.0f} minutes on {os.cpu_count()} cores."]
  )


def findings(found: Sequence[Mapping[str, Any]], seed: int) -> list[str]:
  """A line a finding, with the command that shows it again."""
  return [
    f"{one['outcome']}: {one['what']}\n"
    f"  {(one['said'].strip().splitlines() or [''])[-1][:300]}\n"
    f"  python -m experiments reliability fuzz --seed={seed} --case={one['kind']}:{one['number']}"
    for one in found
    if one["outcome"] in cases.FINDINGS
  ]
