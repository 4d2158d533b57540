"""The one command line of all studies and tools: `python -m experiments STUDY VERB [flags]`."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import pathlib
import shlex
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from experiments.common import findings, journal, outcomes, plots, tables
from experiments.common.entry import guarded, keep_memory
from experiments.common.study import Job, Scale, Study, Verb, plain_name
from moe_jax.errors import ConfigError, choose, whole
from moe_jax.training import progress

# Modules of experiments/ that export STUDY.
STUDIES = (
  "balance_lab",
  "brainformer_search",
  "compare_routers",
  "desk_twins",
  "embedded_corpus",
  "lifelong",
  "lstm_moe",
  "paper_scale",
  "scaling_laws",
  "st_moe_stability",
  "vowels",
)
TOOLS = ("bench", "multiprocess", "mutation", "reliability")
_INDENTED = {
  "initial_indent": "  ",
  "subsequent_indent": "  ",
  "break_on_hyphens": False,
  "break_long_words": False,
}
COST = 0.01  # the relative difference of FLOPs from which on two rows are said to differ
HELP = ("-h", "--help", "--helpfull")
OVERVIEW = """Runs a study: python -m experiments STUDY {run,write,print} [flags]

  run     trains the rows that are not finished, prints what each row came to, and writes tables and
          figures; the same command goes on after a kill
  write   renews tables and figures from the results that are there
  print   prints the command of each row and runs nothing

python -m experiments STUDY shows the verbs, scales and flags of one study."""


class Parser(argparse.ArgumentParser):
  """A parser of flags that tells every mistake as a ConfigError."""

  def __init__(self, **options: Any):
    super().__init__(
      allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options
    )

  def read(self, argv: Sequence[str]) -> argparse.Namespace:
    """Returns the values of the flags.

    Raises:
      ConfigError: A flag does not exist or has a wrong value.
    """
    values, unknown = self.parse_known_args(argv)
    if unknown:
      known = [flag for flag in self._option_string_actions if flag.startswith("--")]
      choose("flag", unknown[0].partition("=")[0], known, shown=unknown[0])
      raise ConfigError("flag", unknown[0], "is given without the value before it")
    return values

  def error(self, message: str) -> None:
    """Raises a ConfigError with the words of argparse."""
    raise ConfigError("arguments", self.prog, f"{message}; --help lists the flags")


def main(argv: Sequence[str]) -> int:
  """Does what the command line says and returns the exit code."""
  keep_memory()
  return guarded(argv, None, lambda rest: _main(rest[1:]))


def _main(argv: Sequence[str]) -> int:
  if not argv or argv[0] in HELP:
    print(overview())
    return 0
  study = load_study(choose("study", argv[0], (*STUDIES, *TOOLS)))
  verbs = verbs_of(study)
  if len(argv) == 1 or argv[1] in HELP:
    print(help_of(study, verbs))
    return 0
  verb = choose("verb", argv[1], verbs)
  return verb.action(_parser(study, argv[1], verb).read(argv[2:]))


def load_study(name: str) -> Study:
  """Imports a study by its name."""
  return importlib.import_module(f"experiments.{name}").STUDY


def overview() -> str:
  """Returns the list of studies and tools with one line each."""
  lines = [OVERVIEW]
  for title, names in (("Studies:", STUDIES), ("Tools:", TOOLS)):
    lines += ["", title, *(f"  {name:20}{load_study(name).about}" for name in names)]
  return "\n".join(lines)


def verbs_of(study: Study) -> dict[str, Verb]:
  """Returns name -> verb, of those that all studies share and of the study's own."""
  verbs = {}
  if study.rows is not None:
    verbs["run"] = Verb(
      "Trains the rows that are not finished, then writes tables and figures.",
      lambda parser: _add_row_flags(parser, study, runs=True),
      lambda options: _run(study, options),
    )
  if study.table is not None or study.figures is not None:
    verbs["write"] = Verb(
      "Renews tables and figures from the results that are there.",
      lambda parser: _add_scale(parser, study, "all that have tables"),
      lambda options: _write(study, options),
    )
  if study.rows is not None:
    verbs["print"] = Verb(
      "Prints the command of each row and runs nothing.",
      lambda parser: _add_row_flags(parser, study, runs=False),
      lambda options: _print(study, options),
    )
  verbs |= study.verbs
  first = [name for name in ("run", "write", "print") if name in verbs]
  return {name: verbs[name] for name in dict.fromkeys((*first, *verbs))}


def help_of(study: Study, verbs: Mapping[str, Verb]) -> str:
  """Returns the help of a study: its verbs, scales and flags."""
  lines = [f"{study.name}: {study.about}", "", "Verbs:"]
  lines += [f"  {name:12}{verb.about}" for name, verb in verbs.items()]
  if study.rows is not None:
    lines += ["", "Scales:"]
    lines += [
      f"  {name:12}{scale.about} ({len(study.rows(name))} rows)"
      for name, scale in study.scales.items()
    ]
    default = next(iter(study.scales))
    lines += ["", f"Rows of {default}:"]
    lines.append(textwrap.fill(", ".join(study.rows(default)), 98, **_INDENTED))
  for name, verb in verbs.items():
    lines += ["", _parser(study, name, verb).format_help().rstrip()]
  return "\n".join(lines)


def _parser(study: Study, name: str, verb: Verb) -> Parser:
  parser = Parser(prog=f"python -m experiments {study.name} {name}", description=verb.about)
  verb.flags(parser)
  return parser


def _add_scale(parser: argparse.ArgumentParser, study: Study, default: str) -> None:
  if len(study.scales) > 1:
    parser.add_argument(
      "--scale", metavar="NAME", help=f"one of {', '.join(study.scales)}; default: {default}"
    )


def _add_row_flags(parser: argparse.ArgumentParser, study: Study, runs: bool) -> None:
  """Adds the flags that choose and change rows, and those of running them."""
  _add_scale(parser, study, next(iter(study.scales)))
  parser.add_argument(
    "--only",
    default="",
    metavar="ROW,...",
    help="names of rows, or parts of names: a name takes its row alone, and a part that is no name "
    "all rows whose names contain it; default: all rows",
  )
  parser.add_argument(
    "--set",
    nargs="+",
    action="extend",
    default=[],
    metavar="KEY=VALUE",
    help="config keys to change in each row, as in --set train.steps=100; the results go to the "
    "workdir only",
  )
  parser.add_argument(
    "--steps",
    metavar="N",
    help="steps of each row, with the same share of warmup; the results go to the workdir only",
  )
  parser.add_argument(
    "--router",
    default="",
    metavar="FILE.py:NAME",
    help="a router of your own file in place of that of each row, which is then called ROW+ROUTER; "
    "the results go to the workdir only, beside those of other rows",
  )
  parser.add_argument(
    "--seeds",
    metavar="N",
    help="seeds 0 to N-1 of each row; if the row's own number is another one, the results go to "
    "the workdir only",
  )
  parser.add_argument(
    "--workdir",
    type=pathlib.Path,
    metavar="DIR",
    help=f"where the runs live; default: runs/{study.name}/SCALE, or .../changed with --set",
  )
  if runs:
    parser.add_argument("--processes", default="1", metavar="N", help="rows at a time; default: 1")
    parser.add_argument(
      "--devices",
      default="",
      metavar="ID,...",
      help="GPUs, as in CUDA_VISIBLE_DEVICES, each of which trains one row at a time",
    )


def _job(study: Study, options: argparse.Namespace) -> Job:
  """Returns the rows that a command line asks for, and where their results go.

  Raises:
    ConfigError: There is no such scale, row or key.
  """
  name, scale = _scale_of(study, options)
  assert study.rows is not None, "a study without rows has no verb that asks for them"
  chosen = choose_rows(study.rows(name), options.only)
  values = _settings(options.set)
  seeds = None if options.seeds is None else whole("seeds", options.seeds, high=1000)
  if seeds is not None and all(row.seeds == seeds for row in chosen.values()):
    seeds = None
  file, colon, router = options.router.rpartition(":")
  # The runs may have another working directory.
  router = f"{pathlib.Path(file).resolve()}:{router}" if colon else options.router
  steps = None if options.steps is None else whole("steps", options.steps, high=10**9)
  tracked = not values and seeds is None and not router and steps is None
  if not tracked:
    if steps is not None:
      chosen = {row: before.shortened(steps) for row, before in chosen.items()}
    chosen = _with_changes(chosen, values, seeds, router)
  workdir = options.workdir or pathlib.Path("runs") / study.name / (name if tracked else "changed")
  results = scale.results if tracked else workdir / "results.jsonl"
  if not tracked and results.resolve() in {each.results for each in study.scales.values()}:
    raise ConfigError(
      "workdir", str(workdir), "has the tracked results of the study; name another folder"
    )
  return Job(name, chosen, results, workdir, tracked=tracked)


def _with_changes(
  rows: Mapping[str, Any], values: Mapping[str, str], seeds: int | None, router: str
) -> dict[str, Any]:
  """Returns the rows with --set, --seeds and --router, whose values are checked.

  A row with another router is called ROW+ROUTER, so that the row itself can stand beside it. Dense
  rows have no router and keep their names.
  """
  changed = {name: row.changed(values, seeds, router) for name, row in rows.items()}
  for row in changed.values():
    row.check()
  if not router:
    return changed
  from moe_jax.commands.router_file import load_router

  suffix = f"+{load_router(router)[0]}"
  named = {f"{name}{suffix if row.router else ''}": row for name, row in changed.items()}
  if named.keys() == rows.keys():
    raise ConfigError(
      "router",
      router,
      f"is read by none of the rows {', '.join(rows)}, which are dense; choose others with --only",
    )
  return named


def _scale_of(study: Study, options: argparse.Namespace) -> tuple[str, Scale]:
  """Returns the name and the scale that --scale asks for, or else the first one."""
  name = getattr(options, "scale", None) or next(iter(study.scales))
  return name, choose("scale", name, study.scales)


def choose_rows(rows: Mapping[str, Any], only: str) -> dict[str, Any]:
  """Returns the rows that `only` names, in the order of the study.

  Args:
    rows: Name -> row.
    only: Parts separated by commas. A part that is a row's name stands for this row, and any other
        part for all rows whose names contain it, which is told on standard error. "" stands for all
      rows.

  Raises:
    ConfigError: A part is in no row's name. The message proposes up to three of the nearest names.
  """
  chosen = set()
  for part in [part for part in only.split(",") if part] or [""]:
    matches = [part] if part in rows else [name for name in rows if part in name]
    if part and part not in rows and matches:
      print(
        f"{part}: no row of that name; taken as a part of: {', '.join(matches)}", file=sys.stderr
      )
    if not matches:
      near = difflib.get_close_matches(part, rows, n=3, cutoff=0.5)
      raise ConfigError(
        "only",
        part,
        "is in no row's name; "
        + (f"did you mean {' or '.join(map(repr, near))}? " if near else "")
        + f"rows: {', '.join(rows)}",
      )
    chosen |= set(matches)
  return {name: row for name, row in rows.items() if name in chosen}


def _settings(texts: Sequence[str]) -> dict[str, str]:
  """Returns `--set` as key -> value."""
  values = {}
  for text in texts:
    key, equals, value = text.partition("=")
    if not key or not equals:
      raise ConfigError("set", text, "must be KEY=VALUE, as in --set train.steps=100")
    values[key.removeprefix("config.")] = value
  return values


def _run(study: Study, options: argparse.Namespace) -> int:
  with progress.working("reading the configs of the rows", tqdm.write):
    job = _job(study, options)
    _tell_costs(study, job)

  def report(name: str, line: journal.Line) -> None:
    tqdm.write(f"{name}: {_verdict(study, job, name, line)}")

  job = Job(
    job.scale,
    job.rows,
    job.results,
    job.workdir,
    whole("processes", options.processes, high=1000),
    [device for device in options.devices.split(",") if device],
    report,
    job.tracked,
  )
  if study.prepare:
    with progress.working("preparing the study", tqdm.write):
      study.prepare(job)
  before = _results(study, job)
  for name in job.rows:
    if name in before:
      report(name, before[name])
  study.train(job)
  if job.tracked:
    with progress.working("writing tables and figures", tqdm.write):
      if study.finish:
        study.finish(job)
      _write_scale(study, job.scale)
  else:
    _write_report(study, job)
  after = _results(study, job)
  return int(any("error" in after[name] for name in job.rows if name in after))


def _results(study: Study, job: Job) -> dict[str, dict[str, Any]]:
  """Returns row -> its line, of the file that the job writes to."""
  return study.load(job.results) if job.tracked else journal.load(job.results)


def _tell_costs(study: Study, job: Job) -> None:
  """Prints where a row with another router costs more or less than the row that it replaces."""
  assert study.rows is not None, "a study without rows has no verb that asks for them"
  for name, row in job.rows.items():
    if (plain := plain_name(name)) == name:
      continue
    before = dataclasses.replace(row, router="")
    (mine, mine_flops), (theirs, their_flops) = row.cost(), before.cost()
    if abs(mine_flops / their_flops - 1) > COST:
      print(
        f"{name}: a token activates {mine:,} parameters and {mine_flops:,.0f} FLOPs, and in "
        f"{plain} {theirs:,} and {their_flops:,.0f}, so that the two differ in cost, too; "
        "model.moe.d_ff is the width of an expert"
      )


def _verdict(study: Study, job: Job, name: str, line: journal.Line) -> str:
  """Returns what a row came to and its differences to other rows, in words."""
  others = _comparisons(study, job, name)
  return study.outcome(line, outcomes.describe(line, others, study.counted, study.paired))


def _comparisons(study: Study, job: Job, name: str) -> dict[str, journal.Line]:
  """Returns words for another row -> its line, of the rows that a row is compared with.

  A changed row is compared with its baseline in the same folder, or else with the tracked one, and
  also with the row itself before the changes.
  """
  plain, others = plain_name(name), {}
  baseline = study.baseline(job.scale, plain)
  tracked = study.load(study.scales[job.scale].results)
  changed = {} if job.tracked else journal.load(job.results)
  if baseline in changed:
    others[f"{baseline} in {job.workdir}"] = changed[baseline]
  elif baseline in tracked:
    others[baseline if job.tracked else f"{baseline} without changes"] = tracked[baseline]
  if name != plain and plain in changed:
    others[f"{plain} in {job.workdir}"] = changed[plain]
  elif not job.tracked and plain in tracked and plain != baseline:
    others[f"{plain} without changes"] = tracked[plain]
  return others


def _write_report(study: Study, job: Job) -> None:
  """Prints the table of all rows of the workdir, writes their page, and says where these are."""
  assert study.rows is not None, "a study without rows has no verb that asks for them"
  known = study.rows(job.scale)
  lines = {
    name: line for name, line in journal.load(job.results).items() if plain_name(name) in known
  }
  if not lines:
    print(f"results: {job.results}")
    return
  table = _table(study, job, lines)
  if len(lines) > 1:
    print(f"\n{tables.text(table[0], table[1:])}\n")
  if remedy := _missing(study, job, lines):
    print(remedy)
  print(f"results: {job.results}")
  file = job.workdir / "report.html"
  verdicts = {name: _verdict(study, job, name, line) for name, line in lines.items()}
  made = plots.page(f"{study.name}, changed rows", lines, verdicts, table)
  file.write_text(made, encoding="utf-8")
  print(f"report: {file}")
  for name in lines:
    if (page := job.workdir / name / "report.html").exists():
      print(f"report of {name}: {page}")


def _table(study: Study, job: Job, lines: Mapping[str, journal.Line]) -> list[list[str]]:
  """Returns the cells of the table of rows, its head first: measures and differences.

  Each row has its difference to its baseline, and one with another router also that to the row
  whose router it replaces, as far as the two are in `lines` and compare.
  """
  units = [found[1] for line in lines.values() if (found := outcomes.measure(line))]
  head = ["", "steps", " or ".join(dict.fromkeys(units)), "minus its baseline", "minus plain row"]

  def minus(line: journal.Line, other: str) -> str:
    if other not in lines:
      return "-"
    found = outcomes.difference(line, lines[other], study.counted, study.paired)
    return f"{found} ({other})" if found else "-"

  rows = []
  for name, line in lines.items():
    plain = plain_name(name)
    rows.append(
      [
        name,
        str(line.get("steps", "-")),
        outcomes.quality(line, study.counted) or "-",
        minus(line, study.baseline(job.scale, plain)),
        minus(line, plain) if plain != name else "-",
      ]
    )
  # A study of rows of its own routers needs no column for others.
  return (
    [head, *rows] if any("+" in name for name in lines) else [row[:-1] for row in [head, *rows]]
  )


def _missing(study: Study, job: Job, lines: Mapping[str, journal.Line]) -> str:
  """Returns how to get the rows to compare with that are not in `lines`, or "" if all are there."""
  plain = [plain_name(name) for name in job.rows]
  baselines = [study.baseline(job.scale, name) for name in plain]
  replaced = [name for name in plain if name not in job.rows]
  missing = [name for name in dict.fromkeys([*baselines, *replaced]) if name and name not in lines]
  if not missing:
    return ""
  return (
    f"to compare with {' and '.join(missing)} under the same changes, give the same command with "
    f"--only={','.join(missing)}" + (" and without --router" if replaced else "")
  )


def _write(study: Study, options: argparse.Namespace) -> int:
  if getattr(options, "scale", None):
    scales = [_scale_of(study, options)[0]]
  else:
    scales = [name for name, scale in study.scales.items() if scale.readmes or not study.table]
  for scale in scales:
    _write_scale(study, scale)
  return 0


def _write_scale(study: Study, name: str) -> None:
  """Renews the figures and the tables of a scale."""
  scale = study.scales[name]
  if study.figures and study.load(scale.results):
    study.figures(name)
  if study.table and scale.readmes:
    made = study.table(name)
    for readme in scale.readmes:
      tables.write(readme, made)
  if study.findings:
    renew_findings()


def renew_findings() -> None:
  """Renews docs/findings.md from the results of all studies."""
  studies = [load_study(name) for name in STUDIES]
  findings.renew((each.name, each.findings()) for each in studies if each.findings)


def _print(study: Study, options: argparse.Namespace) -> int:
  job = _job(study, options)
  for name, row in job.rows.items():
    print(shlex.join(row.command(job.workdir / name)))
  return 0


def check_counts(options: argparse.Namespace, **lowest: float) -> None:
  """Refuses numbers of a command line that are too small.

  Args:
    options: The flags.
    **lowest: Name of a flag -> the least value that it may have.

  Raises:
    ConfigError: A flag is below its lowest value.
  """
  for flag, low in lowest.items():
    # The comparison is false for NaN, which is refused, too.
    if not getattr(options, flag) >= low:
      raise ConfigError(flag, getattr(options, flag), f"must be at least {low}")


def check_folder(flag: str, path: pathlib.Path | None) -> None:
  """Refuses a file that could not be written at the end, before the work begins.

  Raises:
    ConfigError: The path is a folder, or lies in a folder that does not exist.
  """
  if path is not None and (path.is_dir() or not path.parent.is_dir()):
    raise ConfigError(
      flag,
      str(path),
      "must be a file in a folder that exists; create the folder, or name another one",
    )
