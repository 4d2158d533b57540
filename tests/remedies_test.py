"""Tests that the keys, extras and modules that texts tell a user to paste exist."""

import importlib.util
import pathlib
import re

import pytest
from changed import config

pytestmark = pytest.mark.unit

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = [
  p
  for folder in ("moe_jax", "experiments", "configs", "docs")
  for p in (ROOT / folder).rglob("*")
  if p.suffix in (".py", ".md", ".sh")
] + [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile"]
PLACEHOLDERS = {"key", "KEY"}  # stand for any key in usage texts


def mentions(pattern):
  """Returns (file, first group) of every match of `pattern` in the texts of the repository."""
  return [
    (path.relative_to(ROOT), match)
    for path in FILES
    for match in re.findall(pattern, path.read_text())
  ]


def test_keys_exist():
  # Catches a key that was renamed although a text still recommends it.
  from moe_jax.commands.command_line import _keys

  valid_keys = set(_keys(config()))
  matches = mentions(r"--config\.([a-z_][\w.]*\w)")
  wrong = [(str(path), key) for path, key in matches if key not in valid_keys | PLACEHOLDERS]
  assert len(matches) > 50 and not wrong, wrong


def test_extras_exist_and_are_installed_from_the_clone():
  # Catches `pip install moe_jax[...]`, which is in no package index, an extra that setup.py does
  # not define, and brackets without quotes, which zsh expands.
  extras = re.findall(r'^ +"(\w+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE)
  matches = mentions(r"pip install (?:-e|--editable) ('?\.\[[\w,$()]+\]'?)")
  wrong = [
    (str(path), target)
    for path, target in matches
    if "$" not in target and (target[0] != "'" or not set(target[3:-2].split(",")) <= set(extras))
  ]
  assert len(matches) > 5 and not wrong, wrong
  assert not mentions(r"moe_jax\[\w+\]")


def test_modules_exist():
  # Catches a command that was moved.
  modules = {
    (str(path), name)
    for path, name in mentions(r"python -m ((?:moe_jax|experiments)(?:\.[a-z_]+)*)")
  }
  wrong = [pair for pair in modules if importlib.util.find_spec(pair[1]) is None]
  assert len(modules) > 10 and not wrong, wrong


def test_every_command_has_the_same_last_resort():
  # Catches a command that reports a full disk, a closed pipe or Ctrl-C with a traceback.
  commands = [p for p in FILES if p.suffix == ".py" and '__name__ == "__main__"' in p.read_text()]
  # The studies share one command line, which is guarded in experiments/common/command_line.py.
  calls = ("guarded(", "command_line.main(")
  wrong = [str(path) for path in commands if not any(call in path.read_text() for call in calls)]
  assert len(commands) > 5 and not wrong, wrong
