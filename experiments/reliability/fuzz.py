"""Random bad input must end in one sentence, or change nothing.

  python -m experiments reliability fuzz [--configs=2000] [--files=500] [--seed=S]
  python -m experiments reliability fuzz --seed=S --case=KIND:NUMBER

Half of the configs are mutated configs, and half are mutated command lines. A config is validated
and its model traced; some command lines train two steps. A mutated file is one of a run that has
stopped after four steps, which then goes on for two. The tool prints one table, and writes it into
docs/reliability.md with --write. With --case it tries one case again and prints all that it said.
The exit code is 1 if there is a finding.
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

# The seconds that a case may take. Some of the latter two compile programs.
LIMITS = {"config": 30.0, "command": 90.0, "file": 60.0}
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
    "--seed", type=int, help="seeds the mutations; drawn and printed if it is not given"
  )
  parser.add_argument("--case", help="KIND:NUMBER of one case to try again, with its --seed")
  parser.add_argument("--out", type=pathlib.Path, help="a JSONL file that gets all cases")
  parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")


def action(options: argparse.Namespace) -> int:
  """Does what the command line says and returns the exit code."""
  check_counts(options, configs=0, files=0)
  check_folder("out", options.out)
  kind, _, number = (options.case or "config:0").partition(":")
  if kind not in KINDS or not number.isdecimal():
    raise ConfigError(
      "case", options.case, f"must be KIND:NUMBER, and KIND one of {', '.join(KINDS)}"
    )
  if options.case and options.write:
    raise ConfigError("write", True, "would put one case into the table; leave out --case")
  seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
  print(f"seed {seed}", flush=True)
  numbers = {
    "config": options.configs - options.configs // 2,
    "command": options.configs // 2,
    "file": options.files,
  }
  asked = [(kind, number) for kind, count in numbers.items() for number in range(count)]
  if options.case:
    asked = [(kind, int(number))]
  begun = time.monotonic()
  results = fuzz(asked, seed)
  text = table(results, seed, time.monotonic() - begun)
  print(text, *findings(results, seed), sep="\n")
  if options.case:
    print(json.dumps(results[0], indent=1))
  if options.out:
    options.out.write_text("".join(json.dumps(one) + "\n" for one in results))
  if options.write:
    page = ROOT / "docs" / "reliability.md"
    page.write_text(replace(page.read_text(), "fuzz", text))
  return int(any(one["outcome"] in cases.FINDINGS for one in results))


def fuzz(asked: Sequence[tuple[str, int]], seed: int) -> list[dict[str, Any]]:
  """Tries cases and returns what became of each, in their order; see `cases.run`."""
  results = []
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
      results.append(
        result
        or {
          "kind": kind,
          "number": number,
          "outcome": "hang",
          "what": doing.read_text() if doing.exists() else "before it began",
          "said": f"no answer within {LIMITS[kind]:g} seconds, or the process died",
        }
      )
  return sorted(results, key=lambda one: (list(KINDS).index(one["kind"]), one["number"]))


def table(results: Sequence[Mapping[str, Any]], seed: int, seconds: float) -> str:
  """Returns a Markdown table with a row for each kind of input and a column for each outcome."""
  rows = {words: [one for one in results if one["kind"] == kind] for kind, words in KINDS.items()}
  rows["of these trained for two steps"] = [
    one for one in results if one["what"].endswith("(trained)")
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


def findings(results: Sequence[Mapping[str, Any]], seed: int) -> list[str]:
  """Returns words on each finding, with the command that shows it again."""
  return [
    f"{one['outcome']}: {one['what']}\n"
    f"  {(one['said'].strip().splitlines() or [''])[-1][:300]}\n"
    f"  python -m experiments reliability fuzz --seed={seed} --case={one['kind']}:{one['number']}"
    for one in results
    if one["outcome"] in cases.FINDINGS
  ]
