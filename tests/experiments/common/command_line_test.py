"""Checks the one command line of the studies on a study whose program pretends to train."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import pytest

from experiments.common import command_line, journal, sweep
from experiments.common.study import Scale, Study
from moe_jax.assembly.sections import FUNCTIONS
from moe_jax.routing import ROUTERS

pytestmark = pytest.mark.unit
ROOT = pathlib.Path(__file__).resolve().parents[3]

# Leaves a held-out measure that is the value of --config.bits, or of the config's name; "bad" ends
# with exit code 2.
PROGRAM = """
import json, pathlib, sys
flags = dict(arg.removeprefix("--").split("=", 1) for arg in sys.argv[1:])
place = pathlib.Path(flags["workdir"])
place.mkdir(exist_ok=True)
with open(place / "starts", "a") as starts:
  starts.write("x")
if flags["config"] == "bad":
  print("error: no such file", file=sys.stderr)
  sys.exit(2)
bits = float(flags.get("config.bits", 2.0))
count = int(flags.get("seeds", 1))
results = {"mean_bits_per_byte": [bits + 0.1 * i for i in range(count)], "diverged": [None] * count}
results["train"] = {"step": [1, 2], "loss": [[3.0, bits]] * count}
results["steps"] = int(flags.get("config.steps", 400))
(place / "results.json").write_text(json.dumps(results))
"""


@dataclasses.dataclass(frozen=True)
class Fake(sweep.Row):
  """A row of the program above."""

  @property
  def program(self):
    return ("-c", PROGRAM)

  def check(self):
    for key in self.overrides:
      command_line.choose("key", key, ("bits", "steps"))


ROWS = {"base": Fake("a"), "hot": Fake("b", {"bits": 3.0}), "hotter": Fake("c", {"bits": 4.0})}


@pytest.fixture
def study(tmp_path, monkeypatch):
  readme = tmp_path / "README.md"
  readme.write_text("before\n<!-- table:mine -->\nold\n<!-- /table:mine -->\nafter\n")
  results = tmp_path / "tracked.jsonl"

  def table(scale):
    return {"mine": ", ".join(journal.load(results))}

  made = Study(
    name="mine",
    about="A study of nothing.",
    scales={"desk": Scale("small", results, (readme,)), "gpu": Scale("large", tmp_path / "gpu")},
    rows=lambda scale: ROWS if scale == "desk" else {"base": Fake("bad")},
    table=table,
    figures=lambda scale: (tmp_path / "figure").write_text(scale),
    baseline=lambda scale, row: "" if row == "base" else "base",
  )
  monkeypatch.setattr(command_line, "STUDIES", ("mine",))
  monkeypatch.setattr(command_line, "TOOLS", ())
  monkeypatch.setattr(command_line, "load_study", lambda name: made)
  monkeypatch.chdir(tmp_path)
  return tmp_path


def call(*arguments):
  return command_line.main(["experiments", *arguments])


def starts(folder):
  return {path.parent.name: len(path.read_text()) for path in folder.glob("*/starts")}


def test_the_list_and_the_help(study, capsys):
  # Catches a study without its line, a help that does not name verbs, scales or flags.
  assert call() == 0
  assert re.search(r"mine +A study of nothing\.", capsys.readouterr().out)
  assert call("mine") == call("mine", "--help") == 0
  said = capsys.readouterr().out
  for words in (
    "run ",
    "write ",
    "print ",
    "small (3 rows)",
    "large (1 rows)",
    "--only",
    "--seeds",
  ):
    assert words in said


def test_print_says_the_commands_that_run_would_run(study, capsys):
  # Catches commands that are not those that run, rows that cannot be chosen, and a run that starts.
  assert call("mine", "print", "--only=hot", "--set", "bits=1 2", "--seeds=2") == 0
  said = capsys.readouterr().out
  assert said.endswith("--workdir=runs/mine/changed/hot --config=b '--config.bits=1 2' --seeds=2\n")
  assert call("mine", "print", "--workdir=w") == 0
  said = capsys.readouterr().out
  assert "--workdir=w/base --config=a\n" in said and "--workdir=w/hotter --config=c" in said
  assert not (study / "tracked.jsonl").exists() and not (study / "runs").exists()


def test_run_trains_what_is_left_and_says_what_came_of_it(study, capsys):
  # Catches rows that run twice, outcomes that are not told, tables and figures that are not
  # written.
  assert call("mine", "run", "--only=base") == 0
  assert call("mine", "run") == 0
  said = capsys.readouterr().out
  assert said.count("base: 2.000 bits per byte\n") == 2
  assert "hot: 3.000 bits per byte; +1.000 compared with base\n" in said
  assert starts(study / "runs" / "mine" / "desk") == {"base": 1, "hot": 1, "hotter": 1}
  assert "before\n<!-- table:mine -->\nbase, hot, hotter\n" in (study / "README.md").read_text()
  assert (study / "figure").read_text() == "desk"


def test_write_renews_from_the_results_alone(study):
  # Catches a write that trains, or that needs results of scales without tables.
  (study / "tracked.jsonl").write_text(json.dumps({"row": "base", "arguments": []}) + "\n")
  assert call("mine", "write") == 0
  assert "-->\nbase\n<!--" in (study / "README.md").read_text()
  assert not (study / "runs").exists()


def test_changed_rows_leave_the_tracked_results_alone(study, capsys):
  # Catches a row with --set or --seeds in the tracked file, a README or a figure of it, and a
  # comparison that takes the changed row for the tracked one.
  assert call("mine", "run") == 0
  before = {path: path.read_bytes() for path in study.iterdir() if path.is_file()}
  changed = ("mine", "run", "--only=hot", "--set", "bits=2.5", "--workdir=try")
  assert call(*changed) == call(*changed) == 0
  assert {path: path.read_bytes() for path in study.iterdir() if path.is_file()} == before
  assert starts(study / "try") == {"hot": 1}
  assert list(journal.load(study / "try" / "results.jsonl")) == ["hot"]
  assert "<svg" in (study / "try" / "report.html").read_text()
  assert (
    "hot: 2.500 bits per byte; +0.500 compared with base without changes; -0.500 compared with hot "
    "without changes\n"
  ) in capsys.readouterr().out
  assert call("mine", "run", "--only=base", "--seeds=2") == 0
  assert "base: 2.050 ± 0.050 bits per byte over 2 of 2 seeds" in capsys.readouterr().out
  assert starts(study / "runs" / "mine" / "changed") == {"base": 1}
  assert {path: path.read_bytes() for path in study.iterdir() if path.is_file()} == before


def test_other_changes_in_the_same_folder_are_refused(study, capsys):
  # Catches the results of one change under the name of another.
  assert call("mine", "run", "--only=hot", "--set", "bits=2.5", "--workdir=try") == 0
  assert call("mine", "run", "--only=hot", "--set", "bits=2.6", "--workdir=try") == 2
  said = capsys.readouterr().err
  assert "was run with --config.bits=2.5, and is now run with --config.bits=2.6; give the" in said


def test_a_short_row_is_compared_with_rows_of_its_length_only(study, capsys):
  # Catches a difference to rows of other lengths, in words, table or page, and no word of how to
  # get one.
  assert call("mine", "run", "--only=base,hot") == 0
  short = ("--set", "steps=30", "--workdir=try")
  assert call("mine", "run", "--only=hot", *short) == 0
  said = capsys.readouterr().out
  words = "not compared with base without changes, which has 400 steps and not 30"
  assert f"hot: 3.000 bits per byte; {words}" in said
  assert (
    "to compare with base under the same changes, give the same command with --only=base" in said
  )
  page = (study / "try" / "report.html").read_text()
  assert words in page and "+1.000" not in page
  assert call("mine", "run", "--only=base", *short) == 0
  said = capsys.readouterr().out
  assert re.search(r"^hot +30 +3\.000 +\+1\.000 \(base\)$", said, re.MULTILINE)
  assert "to compare" not in said and "+1.000 (base)" in (study / "try" / "report.html").read_text()


def test_changed_rows_may_not_have_the_folder_of_the_study(study, capsys):
  # Catches a --workdir in which results.jsonl is the tracked file.
  (study / "results.jsonl").write_text("")
  made = command_line.load_study("mine")
  made.scales["desk"] = dataclasses.replace(made.scales["desk"], results=study / "results.jsonl")
  assert call("mine", "run", "--only=hot", "--set", "bits=1", f"--workdir={study}") == 2
  assert "has the tracked results" in capsys.readouterr().err
  assert (study / "results.jsonl").read_text() == ""


@pytest.mark.parametrize(
  "arguments, words",
  [
    (["mind"], "did you mean 'mine'"),
    (["mine", "prin"], "did you mean 'print'"),
    (["mine", "--scale=desk"], "known: run, write, print"),
    (["mine", "run", "--scale=desc"], "did you mean 'desk'"),
    (["mine", "run", "--only=hotest"], "did you mean 'hotter' or 'hot'? rows: base, hot, hotter"),
    (["mine", "run", "--onyl=hot"], "did you mean '--only'"),
    (["mine", "run", "--set", "bitz=1"], "did you mean 'bits'"),
    (["mine", "run", "--set", "bits"], "must be KEY=VALUE"),
    (["mine", "run", "--seeds=none"], "must be a whole number"),
    (["mine", "run", "--processes=0"], "must be a whole number"),
    (["mine", "write", "--workdir=x"], "flag='--workdir=x'"),
    (["mine", "run", "--scale=gpu"], "row='base': ended with exit code 2: error: no such file"),
  ],
)
def test_a_mistake_is_one_sentence(study, capsys, arguments, words):
  # Catches a traceback, a page of usage, and a mistake without the nearest name.
  assert call(*arguments) == 2
  said = capsys.readouterr().err
  error = [line for line in said.splitlines() if line.startswith("error: ")]
  assert len(error) == 1 and words in error[0] and "Traceback" not in said


def test_an_exact_name_is_one_row():
  # Catches --only=hot that also takes hotter, and an order that is not the study's.
  assert list(command_line.choose_rows(ROWS, "hot")) == ["hot"]
  assert list(command_line.choose_rows(ROWS, "hott,base")) == ["base", "hotter"]
  assert list(command_line.choose_rows(ROWS, "")) == list(ROWS)
  assert list(command_line.choose_rows(ROWS, "base,")) == ["base"]


def test_a_part_of_a_name_is_told(capsys):
  # Catches --only=top_k that trains noisy_top_k without a word, and a word about an exact name.
  command_line.choose_rows(ROWS, "hott,base")
  said = capsys.readouterr()
  assert said.err == "hott: no row of that name; taken as a part of: hotter\n" and not said.out


def test_no_study_has_a_name_that_looks_like_another_router():
  # Catches a row that would be taken for a copy of another one.
  for name in command_line.STUDIES:
    study = command_line.load_study(name)
    for scale in study.scales if study.rows else ():
      assert not [row for row in study.rows(scale) if "+" in row]


def test_a_row_that_fixes_its_seed_takes_no_number_of_seeds():
  # Catches a row of seed 2 that is trained with seeds 0 to N-1 under its old name.
  with pytest.raises(command_line.ConfigError, match="each row of this study has one seed"):
    sweep.Row("a", {"seed": 2}).changed({}, 3)


def test_a_router_of_ones_own_stands_beside_the_rows(tmp_path, capsys):
  # Catches a file that a run in another folder does not find, a row under its old name, a dense row
  # with a router, and a difference in cost that nobody is told of.
  study = command_line.load_study("compare_routers")
  verb = command_line.verbs_of(study)["run"]
  (tmp_path / "mine.py").write_text("from moe_jax.routing.top_k import top_k as mine\n")
  parser = command_line._parser(study, "run", verb)
  flags = parser.read(["--only=dense,switch", f"--router={tmp_path}/mine.py:mine", "--seeds=1"])
  with pytest.raises(command_line.ConfigError, match="is a router of moe_jax"):
    command_line._job(study, flags)
  (tmp_path / "mine.py").write_text(
    "from moe_jax.routing.top_k import top_k\n\ndef of_a_test(logits, context):\n"
    "  return top_k(logits, context, k=2)\n"
  )
  flags.router = f"{tmp_path}/mine.py:of_a_test"
  try:
    job = command_line._job(study, flags)
    command_line._tell_costs(study, job)
    flags.only = "dense"
    with pytest.raises(command_line.ConfigError, match="read by none of the rows dense"):
      command_line._job(study, flags)
  finally:
    ROUTERS.pop("of_a_test", None)
    FUNCTIONS["model.moe.router"].pop("of_a_test", None)
  assert not job.tracked and list(job.rows) == ["dense", "switch+of_a_test"]
  assert f"--router={tmp_path}/mine.py:of_a_test" in job.rows["switch+of_a_test"].arguments()
  assert not any("--router" in flag for flag in job.rows["dense"].arguments())
  told = r"^switch\+of_a_test: a token activates ([\d,]+) parameters and .*, and in switch ([\d,]+)"
  mine, theirs = re.search(told, capsys.readouterr().out).groups()
  assert int(mine.replace(",", "")) > int(theirs.replace(",", ""))


def test_a_row_with_another_router_is_compared_with_the_row_itself(study, tmp_path):
  # Catches a difference to a row of another name, and a study that knows no row ROW+ROUTER.
  made = command_line.load_study("mine")
  lines = {
    name: {"row": name, "steps": 400, "mean_bits_per_byte": [bits], "diverged": [None]}
    for name, bits in (("base", 2.0), ("hot", 3.0), ("hot+mine", 2.5))
  }
  journal.rewrite(tmp_path / "results.jsonl", lines.values())
  job = command_line.Job("desk", {}, tmp_path / "results.jsonl", tmp_path, tracked=False)
  words = command_line._verdict(made, job, "hot+mine", lines["hot+mine"])
  assert f"+0.500 compared with base in {tmp_path}; -0.500 compared with hot in {tmp_path}" in words
  head, *rows = command_line._table(made, job, lines)
  assert head[-2:] == ["minus its baseline", "minus plain row"]
  assert rows[2] == ["hot+mine", "400", "2.500", "+0.500 (base)", "-0.500 (hot)"]


def commands_of_the_tree():
  """Returns (file, study, verb) of each command that a document, a target or a docstring names."""
  files = [
    path
    for folder in ("docs", "experiments", "moe_jax", "configs")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".md", ".py")
  ]
  for path in (*files, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile"):
    for name, verb in re.findall(r"-m experiments ([a-z]\w*)(?: ([a-z]+))?", path.read_text()):
      yield str(path.relative_to(ROOT)), name, verb


def test_the_commands_that_the_tree_names_exist():
  # Catches a study or a verb that was renamed, in a README or a target that still has its old name.
  found = set(commands_of_the_tree())
  assert len(found) > 25
  for path, name, verb in found:
    assert name in (*command_line.STUDIES, *command_line.TOOLS), (path, name)
    assert not verb or verb in command_line.verbs_of(command_line.load_study(name)), (path, verb)


@pytest.mark.smoke
def test_all_studies_are_listed():
  # Catches a study that cannot be imported, or that has no line.
  done = subprocess.run(
    [sys.executable, "-m", "experiments"], capture_output=True, text=True, check=True
  )
  for name in (*command_line.STUDIES, *command_line.TOOLS):
    assert re.search(rf"^  {name} +\S.*[.?]$", done.stdout, re.MULTILINE), name
