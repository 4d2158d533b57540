"""Tests the command `python -m moe_jax analyse`."""

import json

import pytest
import saved_run

from moe_jax.commands import analyse

pytestmark = pytest.mark.smoke


def run(*arguments):
  return analyse.main(["analyse", *map(str, arguments)])


def test_prints_findings_and_writes_files(tmp_path, capsys):
  # Catches files in another folder than the one that is printed, a checkpoint of another step, a
  # number of tokens that is not used, and files that are overwritten.
  place, _ = saved_run.save(tmp_path)
  (tmp_path / "one.txt").write_text("the expert routes a token to one network\n" * 9)
  arguments = (f"--workdir={place}", f"--sources=text:{tmp_path}/one.txt", "--against=3")
  assert run(*arguments, "--tokens=64") == 0
  printed = capsys.readouterr().out
  assert "lexical rather than topical: is not decided" in printed
  assert "Deeper layers route more sharply: is not decided" in printed
  assert printed.splitlines()[-2:] == [
    str(place / name) for name in ("analysis.html", "analysis.json")
  ]
  summary = json.loads((place / "analysis.json").read_text())
  assert summary["step"] == summary["against"] == 3
  # 64 tokens are a part of a batch, and as many are read.
  assert summary["stacks"]["decoder"]["tokens"] == [4 * 32]
  assert run(*arguments) == 2 and "has an analysis.html already" in capsys.readouterr().err
  assert json.loads((place / "analysis.json").read_text()) == summary


@pytest.mark.parametrize(
  "arguments, words",
  [
    ([], "workdir"),
    (["--workdir=nowhere"], "holds no config.json"),
    (["--workdir=x", "--tokens=many"], "tokens"),
    (["--workdir=x", "--against=-1"], "against"),
    (["--workdir=x", "--to=no/such/folder"], "cannot become one"),
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
  assert all(f"--{flag.name}=" in text for flag in analyse.FLAGS)
