"""Tests `python -m moe_jax COMMAND`, through which all commands can be called."""

import ast
import importlib.metadata
import pathlib
import subprocess
import sys

import pytest

import moe_jax.__main__ as entry

pytestmark = pytest.mark.unit

PACKAGE = pathlib.Path(entry.__file__).parent


def test_the_overview_names_commands_configs_presets_and_keys(capsys):
  # Catches an empty list in the overview, and `python -m moe_jax` alone that is a mistake.
  assert entry.main(["moe_jax"]) == 0
  text = capsys.readouterr().out
  assert all(f"  {name} " in text for name in entry.COMMANDS)
  for word in ("mixtral", "quickstart", "st_moe", "switch", "--config.train.steps=1000"):
    assert word in text, word


def test_every_command_is_named():
  # Catches a module with a `main` that the overview does not name.
  modules = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.name != "help.py"
    and any(
      isinstance(node, ast.FunctionDef) and node.name == "main"
      for node in ast.parse(path.read_text()).body
    )
  }
  assert modules - {"moe_jax.__main__"} == {command.module for command in entry.COMMANDS.values()}


def test_a_command_gets_its_arguments(capsys):
  # Catches arguments that are shifted by one, and an exit code that is lost.
  assert entry.main(["moe_jax", "inspect", "/no/such/run"]) == 2
  assert "workdir='/no/such/run'" in capsys.readouterr().err
  assert entry.main(["moe_jax", "report", "--help"]) == 0
  assert "report.html" in capsys.readouterr().out


def test_an_unknown_command_is_one_sentence(capsys):
  # Catches a traceback, and a mistake without the nearest name.
  assert entry.main(["moe_jax", "trian"]) == 2
  assert "did you mean 'train'?" in capsys.readouterr().err


def test_the_version_names_package_and_jax(capsys):
  # Catches a version that is typed by hand, and a flag that is taken for a command.
  assert entry.main(["moe_jax", "--version"]) == 0
  text = capsys.readouterr().out
  assert f"jax {importlib.metadata.version('jax')}" in text and str(PACKAGE) in text


@pytest.mark.parametrize("program", ["moe_jax", "moe_jax.train", "experiments"])
@pytest.mark.parametrize("argument", ["--help", "train"])
def test_without_jax_one_sentence_says_how_to_install(program, argument):
  # `python -S` finds no installed package.
  # Catches a traceback in the terminal of a user who has not entered the environment.
  command = [sys.executable, "-S", "-m", program, argument]
  done = subprocess.run(command, cwd=PACKAGE.parent, env={}, capture_output=True, text=True)
  assert done.returncode == 1 and done.stdout == ""
  assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
  assert "make venv" in done.stderr and "pip install -e ." in done.stderr
