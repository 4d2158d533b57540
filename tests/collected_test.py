"""Tests that pytest collects every test file below tests/."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys

import pytest

TESTS = pathlib.Path(__file__).resolve().parent


@pytest.mark.smoke
def test_every_file_of_tests_is_collected(tmp_path):
  # Catches a folder that pytest skips because of its name, such as "build", and a file that no
  # pattern matches.
  # The files are collected in a copy of the tree in which each contains one empty test, because
  # importing the real ones takes half a minute.
  written = {path.relative_to(TESTS.parent).as_posix() for path in TESTS.rglob("*_test.py")}
  for name in written:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("def test_nothing(): pass\n")
  shutil.copy(TESTS.parent / "pyproject.toml", tmp_path)
  command = [
    sys.executable,
    "-m",
    "pytest",
    "--collect-only",
    "-q",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:xdist",
  ]
  done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
  collected = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
  assert collected == written, done.stdout[-2000:]
