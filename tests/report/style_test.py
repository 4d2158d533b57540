"""Tests that the style sheet and the script refer to classes and ids that the page has."""

import re

import planted
import pytest
import synthetic

from moe_jax.analysis.results import analyse
from moe_jax.report import write_report
from moe_jax.report.analysis_page import analysis_page
from moe_jax.report.style import CSS, SCRIPT

pytestmark = pytest.mark.unit


def test_style_and_page_agree_on_their_classes(tmp_path):
  # Catches a class that is renamed in one place only.
  pages = ""
  for name, options in {
    "lines": {},
    "maps": {"experts": 32},
    "early": {"stop": 10, "nan_from": 4},
  }.items():
    pages += write_report(synthetic.write_workdir(tmp_path / name, **options)).read_text()
  # Deeper layers route more sharply, or the reverse, so that there are both verdicts.
  sharp = planted.record(planted.by_token, layers=4, rows=2, length=8)
  for recorded in (sharp, sharp._replace(entropy=sharp.entropy[::-1])):
    pages += analysis_page("run", [], {"decoder": (recorded, analyse(recorded))})
  body = re.sub(r"<(style|script).*?</\1>", "", pages, flags=re.S)
  used = {name for names in re.findall(r'class="?([\w ]+)', body) for name in names.split()}
  # The scripts set these classes.
  styled = set(re.findall(r"\.([a-z]+)(?![\w(])", CSS)) - {"only", "on", "tip"}
  experts = {name for name in used if re.fullmatch(r"e\d+|none", name)}
  # The script looks for this class.
  experts.add("routing")
  assert used - experts == styled


def test_script_finds_what_it_looks_for(tmp_path):
  # Catches an id or attribute that is renamed in one place only.
  text = write_report(synthetic.write_workdir(tmp_path / "run")).read_text()
  for name in re.findall(r"getElementById\('([\w-]+)'\)", SCRIPT):
    assert text.count(f'id="{name}"') == 1
  for name in re.findall(r"querySelectorAll\('\[([\w-]+)\]'\)", SCRIPT):
    assert f" {name}=" in re.sub(r"<script>.*?</script>", "", text, flags=re.S)
