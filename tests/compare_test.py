"""Tests the command `python -m moe_jax compare RUN RUN ...`."""

import pytest
import synthetic

from moe_jax import compare

pytestmark = pytest.mark.unit


def two_runs(tmp_path):
  """Returns two workdirs."""
  return [synthetic.write_workdir(tmp_path / name, steps=40) for name in ("one", "two")]


def test_the_command_writes_the_page_and_prints_its_path(tmp_path, capsys):
  # Catches a page that is written elsewhere than is said.
  one, two = two_runs(tmp_path)
  assert compare.main(["compare", str(one), str(two)]) == 0
  assert capsys.readouterr().out.strip() == str(one / "compare.html")
  assert "one against two" in (one / "compare.html").read_text()
  assert compare.main(["compare", str(one), str(two), f"--out={tmp_path / 'page.html'}"]) == 0
  assert (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
  "arguments, words",
  [
    (["one"], "at least two workdirs"),
    (["one", "nowhere"], "RUN='nowhere'"),
    (["one", "two", "--out=no/folder.html"], "out='no/folder.html'"),
    (["one", "two", "--out=notes.md"], "must end in .html"),
  ],
)
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, capsys, arguments, words):
  # Catches a traceback, and an empty page for a mistyped path.
  two_runs(tmp_path)
  monkeypatch.chdir(tmp_path)
  assert compare.main(["compare", *arguments]) == 2
  assert words in capsys.readouterr().err
