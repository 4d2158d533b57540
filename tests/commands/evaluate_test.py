"""Tests the command `python -m moe_jax evaluate`."""

import json

import pytest
import saved_run

import moe_jax
from moe_jax.commands import evaluate

pytestmark = pytest.mark.smoke


def run(*arguments):
  return evaluate.main(["evaluate", *map(str, arguments)])


def test_prints_a_table_and_writes_the_results(tmp_path, capsys):
  # Catches a table of other numbers than the file's, options that are not passed on, and results
  # that are overwritten.
  place, _ = saved_run.save(tmp_path)
  (tmp_path / "one.txt").write_text("the expert routes a token to one network\n")
  out = tmp_path / "results.json"
  arguments = (f"--workdir={place}", f"--sources=text:{tmp_path}/one.txt", f"--out={out}")
  assert run(*arguments, "--batch_size=2") == 0
  expected = moe_jax.evaluate(place, [f"text:{tmp_path}/one.txt"], batch_size=2)
  assert json.loads(out.read_text()) == expected
  ((name, measures),) = expected.items()
  # The boundary after the text is a target, too.
  line = capsys.readouterr().out.splitlines()[1].split()
  assert line == [
    name,
    *(f"{measures[key]:.4f}" for key in ("bits_per_byte", "perplexity", "loss")),
    "42",
    "41",
  ]
  assert run(*arguments) == 2 and "exists already" in capsys.readouterr().err


def test_lines_of_tasks():
  # Catches a standard error that is shown as a measure, and a name that is shown as a number.
  results = {
    "choices": {"alias": "choices", "acc,none": 0.5, "acc_stderr,none": 0.25, "n": 3},
    "answer": {"exact_match,strict": 1.0, "exact_match_stderr,strict": "N/A"},
  }
  assert evaluate.task_lines(results) == [
    "choices: acc 0.5000 +- 0.2500",
    "answer: exact_match 1.0000",
  ]


@pytest.mark.parametrize(
  "arguments, words",
  [
    ([], "workdir"),
    (["--workdir=nowhere"], "holds no config.json"),
    (["--workdir=x", "--tasks=a", "--split=all"], "for text, without --tasks"),
    (["--workdir=x", "--fewshot=1"], "for --tasks"),
    (["--workdir=x", "--batches=many"], "batches"),
    (["--workdir=x", "--out=no/folder.json"], "out='no/folder.json'"),
    (["--workdir=x", "--source=a"], "did you mean --sources?"),
  ],
)
def test_mistakes_are_one_sentence(arguments, words, capsys):
  # Catches a traceback, and a run that is loaded before a flag is checked.
  assert run(*arguments) == 2
  assert words in capsys.readouterr().err


def test_help_names_every_flag(capsys):
  # Catches a flag that nobody can find.
  assert run("--help") == 0
  text = capsys.readouterr().out
  assert all(f"--{flag.name}=" in text for flag in evaluate.FLAGS)
