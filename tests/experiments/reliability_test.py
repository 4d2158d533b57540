"""Checks that the fuzzer notices what it looks for, and that a few cases find nothing."""

import pathlib
import random

import pytest

from experiments.common import command_line
from experiments.reliability import cases, fuzz, mutate, workers
from moe_jax.errors import ConfigError

pytestmark = pytest.mark.smoke


def test_a_few_cases_find_nothing():
  # Catches a check that lets an exception through, a worker that does not answer, and results in
  # another order.
  asked = [*(("config", n) for n in range(6)), *(("command", n) for n in range(6)), ("file", 2)]
  found = fuzz.fuzz(asked, seed=11)
  assert [(one["kind"], one["number"]) for one in found] == asked
  assert not fuzz.findings(found, 11), fuzz.findings(found, 11)
  for kind in ("config", "command"):
    assert {one["outcome"] for one in found if one["kind"] == kind} == {"runs", "one sentence"}


def test_a_case_is_drawn_from_its_seed_alone():
  # Catches a case that --case cannot show again.
  def draws():
    return random.Random("7 config 3")

  for before in (1, "x", (1,), 0.5, True):
    assert repr(mutate.value(draws(), before)) == repr(mutate.value(draws(), before))


@pytest.mark.parametrize("how", mutate.FILES)
def test_a_mutation_changes_the_file(tmp_path, how):
  # Catches a mutation that leaves the file as it was, so that its cases say nothing.
  for number in range(5):
    path = tmp_path / f"{number}.jsonl"
    path.write_text('{"step": 1, "kind": "train"}\n{"step": 2, "kind": "train"}\n')
    mutate.FILES[how](random.Random(number), path)
    assert not path.is_file() or path.read_text(errors="replace") != (
      '{"step": 1, "kind": "train"}\n{"step": 2, "kind": "train"}\n'
    )


def test_workers_end_what_takes_too_long(tmp_path, monkeypatch):
  # Catches a hang that is waited for, a dead process whose case is lost, and the cases after one of
  # these.
  monkeypatch.setattr(workers._Worker, "grace", 5.0)
  asked = [
    ("__import__('time').sleep(60)",),
    ("'a'",),
    ("__import__('os')._exit(3)",),
    ("'b'",),
    ("'c'",),
  ]
  found = dict(workers.work(eval, asked, lambda case: 1.0, 2, tmp_path))
  assert [found[case] for case in asked] == [None, "a", None, "b", "c"]


def test_outcomes():
  # Catches a traceback that counts as a sentence, an error without one, and a success with a
  # warning that counts as one.
  assert cases._outcome(0, "a warning\n")[0] == "runs"
  assert cases._outcome(2, "error: a=1: must be 2\n")[0] == "one sentence"
  assert (
    cases._outcome(1, "Traceback (most recent call last)\nerror: This is a bug of the program\n")[0]
    == "traceback"
  )
  assert cases._outcome(2, "")[0] == cases._outcome(1, "error: a\nerror: b\n")[0] == "traceback"


def test_the_table_counts_and_findings_can_be_shown_again():
  # Catches a column under another's head, and a finding without the command that shows it.
  found = [
    {"kind": "config", "number": n, "what": "w", "outcome": outcome, "said": "a\nlast"}
    for n, outcome in enumerate(cases.OUTCOMES)
  ]
  text = fuzz.table(found, 9, 120.0)
  assert "| configs | 7 | " + " | ".join("1" * 7) + " |" in text and "Seed 9, 2 minutes" in text
  told = fuzz.findings(found, 9)
  assert len(told) == 5 and "--seed=9 --case=config:2" in told[0] and "last" in told[0]


def test_the_page_has_room_for_the_table():
  # Catches markers that were moved away, which --write would look for in vain.
  page = pathlib.Path(fuzz.ROOT / "docs" / "reliability.md").read_text()
  assert page.index("<!-- table:fuzz -->") < page.index("<!-- /table:fuzz -->")


@pytest.mark.parametrize(
  "command, flag, words",
  [
    ("reliability soak", "--runs=0", "runs=0: must be at least 1"),
    ("reliability soak", "--kills=0", "kills=0"),
    ("reliability fuzz", "--configs=-1", "configs=-1"),
    (
      "reliability fuzz",
      "--out=/nowhere/found.jsonl",
      "out='/nowhere/found.jsonl': must be a file in a folder that exists",
    ),
    ("mutation run", "--count=0", "count=0"),
    ("bench dispatchers", "--repeats=0", "repeats=0"),
    ("bench dispatchers", "--shapes=S0", "known: S1, S2"),
    ("bench routing", "--routers=top_kk", "did you mean 'top_k'"),
    ("bench routing", "--out=/nowhere/routing.json", "out='/nowhere"),
    ("mutation run", "--seconds=nan", "seconds=nan: must be at least 0"),
    ("mutation run", "--out=/nowhere/found.jsonl", "out='/nowhere"),
    ("mutation run", "--only=nobody", "only='nobody'"),
    ("mutation run", "--judges=nobody", "judges='nobody'"),
    ("reliability memory", "--steps=5", "steps=5"),
    ("reliability faults", "--only=nobody", "nobody"),
  ],
)
def test_flags_that_make_no_sense(capsys, command, flag, words):
  # Catches a number or a file that is only found to be wrong after the work, or a table of nothing.
  assert command_line.main(["experiments", *command.split(), flag]) == 2
  assert words in capsys.readouterr().err


def test_a_file_for_results(tmp_path):
  # Catches a folder that would be written to as a file, and a good place that is refused.
  command_line.check_folder("out", None)
  command_line.check_folder("out", tmp_path / "found.jsonl")
  with pytest.raises(ConfigError, match="must be a file"):
    command_line.check_folder("out", tmp_path)
