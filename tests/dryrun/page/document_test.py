"""Tests the page and the JSON file of a dry run."""

import json

import canned
import pytest

from moe_jax.dryrun.page import document
from moe_jax.errors import ConfigError

pytestmark = pytest.mark.unit


def test_both_files_and_their_keys(tmp_path):
  # Catches a key that is missing from the JSON, NaN, which JSON lacks, and a page that needs
  # another file.
  path = document.write(tmp_path / "new" / "folder", canned.report())
  read = json.loads(
    (path.parent / "report.json").read_text(), parse_constant=lambda word: pytest.fail(word)
  )
  assert set(read) == set(canned.report()) and read["roofline"]["networks"]["data"] is None
  html = path.read_text()
  assert html.count("<svg") == html.count("</svg>") == 3 and "v4 has 32.00" in html
  assert "src=" not in html and "href=" not in html and "&lt;2112.06905&gt;" in html
  assert "compiler estimate, not measured" in html


def test_what_does_not_fit_has_a_page(tmp_path):
  # Catches a page that expects times although there are none.
  html = document.write(tmp_path, canned.too_large()).read_text()
  assert "does not fit; needs 40.00 GiB" in html and html.count("<svg") == 1


def test_a_folder_that_cannot_be_written(tmp_path):
  # Catches a traceback after minutes of compiling.
  (tmp_path / "file").write_text("")
  with pytest.raises(ConfigError, match="workdir="):
    document.write(tmp_path / "file" / "folder", canned.report())
