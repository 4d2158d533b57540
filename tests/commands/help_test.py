"""The options in words, and the page that holds them all."""

import pathlib

import pytest

from moe_jax.assembly.sections import KEYS
from moe_jax.commands import guarded
from moe_jax.commands import help as helping
from moe_jax.errors import ConfigError

pytestmark = pytest.mark.unit
PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "options.md"


def test_the_page_is_current():
  # Catches an option that was added or changed without its documentation. Renew the page with
  # `python -m moe_jax.commands.help --write docs/options.md`.
  assert PAGE.read_text() == helping.page()


def test_every_option_is_there():
  # Catches a section without its options, and an option of a router without words.
  text = helping.section_text("all")
  assert all(f"--config.{key}=" in text for key in KEYS)
  router = helping.section_text("model.moe.router").split("--config.")[1:]
  assert len(router) > 30
  undocumented = [entry for entry in router if entry.split("\n")[1].strip().startswith("It must")]
  assert not undocumented
  with pytest.raises(ConfigError, match="help='modle': did you mean 'model'"):
    helping.section_text("modle")


def test_write(tmp_path, capsys):
  # Catches --write that prints, or a print that writes.
  assert helping.main(["help", f"--write={tmp_path / 'page.md'}"]) == 0
  assert (tmp_path / "page.md").read_text() == helping.page() and not capsys.readouterr().out
  assert helping.main(["help"]) == 0 and "--config.seed=0" in capsys.readouterr().out


def test_mistakes(tmp_path, capsys):
  # Catches a traceback for a folder that is not there, and an argument that is silently ignored.
  for argument, words in (
    (f"--write={tmp_path / 'no' / 'page.md'}", "give a file that can be written"),
    ("page.md", "argument='page.md': is one too many; there are only flags"),
  ):
    assert guarded(["help", argument], "", helping.main) == 2
    assert words in capsys.readouterr().err
