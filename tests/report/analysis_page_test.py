"""Tests the page about experts, with planted specialisation."""

import json
import re

import numpy as np
import planted
import pytest

from moe_jax.analysis.results import analyse
from moe_jax.report.analysis_page import COLOURED, analysis_page, first_middle_last

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def stack():
  recorded = planted.record(planted.by_token, layers=5, rows=15, domains=2)
  recorded = recorded._replace(domains=["prose <b>", "code"])
  return recorded, analyse(recorded, recorded.first)


def test_panels_show_the_first_the_middle_and_the_last_layer(stack):
  # Catches a panel that shows the tokens or the experts of another domain or layer.
  recorded, _ = stack
  page = analysis_page("run", ["step 3"], {"decoder": stack})
  panels = re.findall(r'<div class="page" data-text="(\d)" data-at="(\d)">(.*?)</div>', page)
  assert [panel[:2] for panel in panels] == [(d, at) for d in "01" for at in "024"]
  for domain, layer, tokens in panels:
    shown = np.flatnonzero(recorded.domain == int(domain))[:COLOURED]
    found = re.findall(r'<i class="e(\d)"(?: s)?>(.)</i>', tokens)
    # Rows have 64 tokens, and text is left out between them.
    assert tokens.count(" s>") == (COLOURED - 1) // 64
    assert [int(expert) for expert, _ in found] == recorded.first[int(layer), shown].tolist()
    assert "".join(piece for _, piece in found) == "".join(recorded.pieces[i] for i in shown)
  (data,) = re.findall(r'<script type="application/json">(.*?)</script>', page)
  assert (
    json.loads(data)["pages"][1]
    == recorded.first[:, np.flatnonzero(recorded.domain == 1)[:COLOURED]].tolist()
  )
  assert "<b>" not in "".join(re.findall(r"<h3>.*?</h3>", page)) and "prose &lt;b&gt;" in page


def test_verdicts_and_numbers_are_those_of_the_results(stack):
  # Catches a verdict with the colour of another one, and shares that are shown of another layer.
  _, result = stack
  page = analysis_page("run", [], {"decoder": stack})
  assert re.findall(r'class="finding( \w+)?"><b>(.*?)\.</b>', page) == [
    (" holds", "Specialisation is lexical rather than topical: holds"),
    (" holds", "Deeper layers route more sharply: holds"),
  ]
  table = page.partition("What explains the expert")[2].partition("</table>")[0]
  rows = re.findall(r"<tr><td>(layer \d)</td><td>[\d.]+</td><td>.*?</td><td>(.*?)</td>", table)
  assert [name for name, _ in rows] == result["layers"]
  assert [float(cell.partition(" ")[0]) for _, cell in rows] == [
    pytest.approx(100 * layer["token"]["value"], abs=0.051) for layer in result["explained"]
  ]
  for title in ("Sharpness", "Repetition", "Domains by expert", "Typical", "From layer", "Churn"):
    assert f"<h2>{title}" in page
  # Layers that are neither first, middle nor last are behind a fold.
  assert page.count("<details>") == 4


def test_stacks_are_told_apart_and_many_experts_are_a_picture():
  # Catches a page that is refused, or of many megabytes, for a model with many experts.
  recorded = planted.record(planted.by_token, rows=2, length=8)
  recorded = recorded._replace(num_experts=100, second=np.full_like(recorded.first, 100))
  result = analyse(recorded)
  page = analysis_page("run", [], {"encoder": (recorded, result), "decoder": (recorded, result)})
  assert "<h2>The encoder</h2>" in page and "<h2>The decoder</h2>" in page
  assert page.count("data:image/png") == 2 and "Domains by expert" not in page
  assert "first or second" not in page and "Churn" not in page


def test_first_middle_last():
  # Catches a layer that is shown twice.
  assert [first_middle_last(n) for n in (0, 1, 2, 3, 32)] == [
    [],
    [0],
    [0, 1],
    [0, 1, 2],
    [0, 15, 31],
  ]
