"""What the tree tells a user to paste does exist: keys, extras, modules."""

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
PLACEHOLDERS = {"key", "KEY"}  # in usage texts


def said(pattern):
  """(file, first group) of every match in the tree."""
  return [
    (path.relative_to(ROOT), match)
    for path in FILES
    for match in re.findall(pattern, path.read_text())
  ]


def test_keys_exist():
  # Catches: a renamed key that a sentence still recommends.
  from moe_jax.commands.command_line import _keys

  known = set(_keys(config()))
  found = said(r"--config\.([a-z_][\w.]*\w)")
  wrong = [(str(path), key) for path, key in found if key not in known | PLACEHOLDERS]
  assert len(found) > 50 and not wrong, wrong


def test_extras_exist_and_are_installed_from_the_clone():
  # Catches: pip install moe_jax[...], which is on no index; an extra that setup.py has not;
  # brackets that zsh expands.
  extras = re.findall(r'^ +"(\w+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE)
  found = said(r"pip install (?:-e|--editable) ('?\.\[[\w,$()]+\]'?)")
  wrong = [
    (str(path), what)
    for path, what in found
    if "$" not in what and (what[0] != "'" or not set(what[3:-2].split(",")) <= set(extras))
  ]
  assert len(found) > 5 and not wrong, wrong
  assert not said(r"moe_jax\[\w+\]")


def test_modules_exist():
  # Catches: a command that was moved.
  found = {
    (str(path), name) for path, name in said(r"python -m ((?:moe_jax|experiments)(?:\.[a-z_]+)*)")
  }
  wrong = [pair for pair in found if importlib.util.find_spec(pair[1]) is None]
  assert len(found) > 10 and not wrong, wrong


def test_every_command_has_the_same_last_resort():
  # Catches: a command that tells a full disk, a closed pipe or Ctrl-C by a traceback.
  commands = [p for p in FILES if p.suffix == ".py" and '__name__ == "__main__"' in p.read_text()]
  # The studies share one command line, which is guarded in experiments/common/command_line.py.
  calls = ("guarded(", "command_line.main(")
  wrong = [str(path) for path in commands if not any(call in path.read_text() for call in calls)]
  assert len(commands) > 5 and not wrong, wrong
