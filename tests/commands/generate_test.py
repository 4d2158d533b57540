"""Tests the command `python -m moe_jax generate`."""

import json

import pytest
import saved_run

import moe_jax
from moe_jax.commands import generate

pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """The workdir of a run."""
  return saved_run.save(tmp_path_factory.mktemp("run"))[0]


def run(*arguments):
  return generate.main(["generate", *map(str, arguments)])


def test_prints_the_prompt_and_its_text(place, capsys):
  # Catches a text of other options than the flags say, and a prompt that is left out.
  flags = ("--max_tokens=5", "--temperature=2", "--top_k=9", "--top_p=0.9", "--seed=1")
  assert run(f"--workdir={place}", "--prompt=the", *flags) == 0
  text = moe_jax.generate(place, "the", max_tokens=5, temperature=2.0, top_k=9, top_p=0.9, seed=1)
  assert capsys.readouterr().out == f"the{text}\n"


def test_continues_the_lines_of_a_file(place, tmp_path, capsys):
  # Catches lines that are continued as one text, and text that JSON cannot hold.
  (tmp_path / "prompts.txt").write_text("the\n\né\n", encoding="utf-8")
  assert run(f"--workdir={place}", f"--prompts={tmp_path / 'prompts.txt'}", "--max_tokens=3") == 0
  rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [row["prompt"] for row in rows] == ["the", "é"]
  assert [row["text"] for row in rows] == moe_jax.generate(place, ["the", "é"], max_tokens=3)


@pytest.mark.parametrize(
  "arguments, words",
  [
    (["--prompt=a"], "workdir"),
    (["--workdir=nowhere"], "holds no config.json"),
    (["--workdir=x", "--max_tokens=0"], "max_tokens"),
    (["--workdir=x", "--temperature=hot"], "must be a number"),
    (["--workdir=x", "--top_p=2"], "top_p"),
    (["--workdir=x", "--prompt=a", "--prompts=b"], "give one of both"),
    (["--workdir=x", "--prompts=nowhere.txt"], "prompts='nowhere.txt'"),
    (["--workdir=x", "--mesh=tenser=2"], "tensor=4"),
    (["--workdir=x", "--tempreature=1"], "did you mean --temperature?"),
    (["--workdir=x", "word"], "argument='word'"),
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
  assert all(f"--{flag.name}=" in text for flag in generate.FLAGS)
