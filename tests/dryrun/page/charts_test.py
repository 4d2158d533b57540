"""Tests the charts of stacked bars."""

import re

import pytest

from moe_jax.dryrun.page.charts import Bar, Part, bars

pytestmark = pytest.mark.unit


def test_lengths_are_to_scale():
  # The pieces have the lengths 1 and 3, so the second one is three times as wide and begins where
  # the first one ends. The limit is 8. Catches pieces that are drawn over each other, and a limit
  # outside the picture.
  svg = bars(
    "GiB",
    [Bar("a", [Part("x", 1.0, "#111111", ""), Part("y", 3.0, "#222222", "")], "4")],
    "GiB",
    limit=("most <8>", 8.0),
    width=560,
    left=100,
  )
  rects = [
    tuple(map(float, found))
    for found in re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', svg)
  ]
  (x, one), (after, three) = rects
  assert three == pytest.approx(3 * one, rel=0.01) and after == pytest.approx(x + one, abs=0.11)
  line = float(re.search(r'<path d="M([\d.]+) [\d.]+V\d+" class="level"', svg)[1])
  assert line == pytest.approx(x + 8 * one, rel=0.01) and line < 560 - 100
  assert "most &lt;8&gt;" in svg and svg.count("<span>") == 2


def test_nothing_to_draw():
  # Catches a division by the length of the longest bar if it is 0, and NaN in an SVG.
  lost, kept = Part("x", float("nan"), "#111111", ""), Part("y", 1.0, "#222222", "")
  assert bars("s", [], "s") == "" == bars("s", [Bar("a", [lost], "?")], "s")
  assert "nan" not in bars("s", [Bar("a", [lost, kept], "?")], "s")
