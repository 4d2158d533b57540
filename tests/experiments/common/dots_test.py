import re
import xml.etree.ElementTree as ET

import pytest

from experiments.common.dots import dot_file

pytestmark = pytest.mark.unit


def circles(text):
  """Returns (x, y, radius, colour) of each dot below the legend."""
  dots = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="(\d)" fill="(#\w+)"', text)
  return [(float(x), float(y), int(r), c) for x, y, r, c in dots if float(y) > 50]


def test_places_and_colours():
  # Catches values that are mirrored or on the wrong line, a series with two colours, and a mark
  # that lies outside of the axis.
  rows = {"a": {"first": -1.0, "mean": 0.0}, "b": {"first": 2.0, "mean": 1.0}}
  text = dot_file("A & B", rows, "difference", mark=-2.0, bold=("mean",))
  ET.fromstring(text)
  (a1, am), (b1, bm) = circles(text)[:2], circles(text)[2:]
  assert a1[0] < am[0] < bm[0] < b1[0] and a1[1] == am[1] < b1[1] == bm[1]
  # Equal steps of the value are equal steps on the paper.
  assert am[0] - a1[0] == pytest.approx(bm[0] - am[0], abs=0.11)
  assert a1[3] == b1[3] != am[3] == bm[3] and (a1[2], am[2]) == (4, 6)
  mark = float(re.search(r'd="M([\d.]+) 52V\d+" class="axis"', text)[1])
  assert mark < a1[0]
  assert "A &amp; B" in text and "difference" in text


def test_one_value():
  # Catches a division by the range of a single value.
  assert len(circles(dot_file("t", {"only": {"s": 3.0}}, "x"))) == 1
