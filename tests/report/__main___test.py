"""Tests the command `python -m moe_jax.report DIR`."""

import runpy
import sys

import pytest
import synthetic

pytestmark = pytest.mark.unit


def run(monkeypatch, *arguments):
  monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
  with pytest.raises(SystemExit) as stopped:
    runpy.run_module("moe_jax.report", run_name="__main__")
  return stopped.value.code


def test_makes_the_report_again_and_says_where(tmp_path, monkeypatch, capsys):
  # Catches a command that computes and does not write.
  path = synthetic.write_workdir(tmp_path / "run", steps=20)
  assert run(monkeypatch, path) == 0
  assert (
    capsys.readouterr().out.strip() == str(path / "report.html") and (path / "report.html").exists()
  )


def test_a_wrong_folder_is_one_sentence_and_code_2(tmp_path, monkeypatch, capsys):
  # Catches a traceback for a mistyped path.
  assert run(monkeypatch, tmp_path / "no") == 2
  error = capsys.readouterr().err.strip()
  assert error.startswith("error: workdir=") and "\n" not in error
