"""Tests where the charts place lines and labels."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from moe_jax.report.charts import Level, Line, line_chart, line_file, load_map

pytestmark = pytest.mark.unit


def points(svg):
  """Returns each line as a list of strokes, each of which is a list of (x, y)."""
  paths = re.findall(r'<path d="([^"]*)" fill="none" stroke="#', svg)
  return [
    [
      [tuple(map(float, p.split())) for p in re.split("L", stroke)]
      for stroke in path.split("M")[1:]
    ]
    for path in paths
  ]


def line(*y, label="a"):
  return Line(label, np.arange(1.0, len(y) + 1), np.array(y, float), "#0072b2")


def test_larger_is_higher_and_later_is_further_right():
  # Catches an axis that is upside down.
  ((stroke,),) = points(line_chart("t", [line(1, 3, 2)]))
  (x0, y0), (x1, y1), (x2, y2) = stroke
  assert x0 < x1 < x2 and y1 < y2 < y0


def test_a_line_at_the_bottom_stays_there():
  # Catches a drop rate of 0 in the middle of the chart, between negative rates.
  labels = re.findall(r">(-?[\d.]+)</text>", line_chart("t", [line(0, 0, 0)], bottom=0.0))
  assert not [label for label in labels if label.startswith("-")]
  ((stroke,),) = points(line_chart("t", [line(0, 0, 0)], bottom=0.0))
  ((risen,),) = points(line_chart("t", [line(0, 0, 1)], bottom=0.0))
  assert stroke[0][1] == risen[0][1]


def test_gaps_split_the_line():
  # Catches "nan" in a path, after which browsers draw nothing.
  svg = line_chart("t", [line(1, np.nan, 2, np.inf, 3, 4)])
  assert [len(stroke) for stroke in points(svg)[0]] == [1, 1, 2]
  assert "2 values not finite" in svg and "nan" not in svg


@pytest.mark.parametrize("y", [[np.nan, np.nan], [0, 0], [5], [1e-30, 2e-30], [-1e9, 1e9], [0, -1]])
@pytest.mark.parametrize("log", [False, True])
def test_degenerate_values(y, log):
  # Catches a division by a range of zero, a logarithm of zero, and an endless number of ticks.
  svg = line_chart("t", [line(*y)], log=log, levels=[Level("l", 0.0), Level("n", np.nan)])
  assert svg.count("<text") < 40 and not re.search(r'="[^"]*(nan|inf)', svg)


def test_nothing_to_draw():
  # Catches an empty frame.
  assert line_chart("t", []) == "" and line_chart("t", [line()]) == ""


def test_labels_of_levels_do_not_overlap():
  # Catches names of rungs that are printed over each other: 2.05, 2.0 and 1.95 are only a pixel or
  # two apart.
  svg = line_chart(
    "t", [line(8, 2)], levels=[Level("trigram", 2.05), Level("5-gram", 2.0), Level("other", 1.95)]
  )
  at = sorted(float(y) for y in re.findall(r'y="([\d.]+)">(?:trigram|5-gram|other)', svg))
  assert len(at) == 3 and min(np.diff(at)) >= 12


def test_top_keeps_the_early_values_from_squeezing_the_rest():
  # Catches a bound that is ignored. Without it, a loss of 0.1 is a hundredth of the height.
  ((stroke,),) = points(line_chart("t", [line(12, 2.1, 2.0)], top=2.2))
  assert stroke[2][1] - stroke[1][1] > 50 and stroke[0][1] < 0


def test_legend_only_for_several_lines_and_never_for_faint_ones():
  # Catches a legend that repeats the title.
  assert "legend" not in line_chart("t", [line(1, 2), line(1, 2)._replace(faint=True)])
  assert line_chart("t", [line(1, 2, label="<a>"), line(2, 3, label="b")]).count("<span><b") == 2
  assert "&lt;a&gt;" in line_chart("t", [line(1, 2, label="<a>"), line(2, 3, label="b")])


def test_load_map_labels_experts():
  # Catches labels that are too close to each other if there are many experts.
  svg = load_map("t", np.arange(5.0), np.full((5, 64), 1 / 64))
  shown = [int(e) for e in re.findall(r'text-anchor="end">(\d+)<', svg)]
  assert shown[0] == 0 and 10 < len(shown) <= 40 and "data:image/png" in svg


def test_a_chart_as_a_file():
  # Catches a file that needs the page's style sheet or script, lines without a legend, and text
  # that is not valid XML.
  made = line_file(
    "a < b", [line(1, 3, 2, label="one & two"), line(2, 2, 2, label="three")], log=True
  )
  root = ElementTree.fromstring(made)
  texts = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
  assert {"a < b", "one & two", "three", "step"} <= set(texts) and len(points(made)) == 2
  assert root.attrib["viewBox"].split()[3] == root.attrib["height"] and 'class="level"' not in made


def test_a_band_lies_around_its_line_and_in_the_plot():
  # Catches a range of y that ignores the band, edges that are joined crosswise, and nan in a path.
  edges = np.array([0.0, np.nan, 1.0]), np.array([2.0, 4.0, 9.0])
  made = line_file("t", [line(1, 3, 2)._replace(band=edges)], y_label="bits")
  ((stroke,),) = points(made)
  around = re.search(r'd="M([^"]*)Z" fill="#0072b2" opacity', made)[1]
  first, last, last_low, first_low = [tuple(map(float, p.split())) for p in around.split("L")]
  assert first[0] == first_low[0] == stroke[0][0] and last[0] == last_low[0] == stroke[2][0]
  assert first[1] < stroke[0][1] < first_low[1] and 0 <= last[1] < stroke[2][1] < last_low[1]
  assert "nan" not in made and ">bits</text>" in made


@pytest.mark.parametrize("draw", [line_chart, line_file])
def test_a_logarithmic_axis_leaves_gaps_where_there_is_no_logarithm(draw):
  # Catches a value or an edge of a band <= 0 that sets the range of a logarithmic axis: the range
  # would fall back to (0.1, 10), and the values 200 to 800 would lie outside the plot.
  edges = np.array([-50.0, 100.0, 0.0, 400.0]), np.array([300.0, 400.0, 600.0, 1600.0])
  made = draw("t", [line(200, 400, 0, 800)._replace(band=edges)], log=True)
  (strokes,) = points(made)
  assert [len(stroke) for stroke in strokes] == [2, 1]
  ys = [y for stroke in strokes for _, y in stroke]
  assert 0 < ys[2] < ys[1] < ys[0] < 250
  # Equal ratios are equal distances.
  np.testing.assert_allclose(ys[0] - ys[1], ys[1] - ys[2], atol=0.11)
  # Only the second and the fourth point have both edges.
  around = re.search(r'd="M([^"]*)Z" fill="#0072b2" opacity', made)[1]
  assert len(around.split("L")) == 4 and not re.search(r'="[^"]*(nan|inf)', made)


def test_a_band_without_any_finite_edge_is_not_drawn():
  # Catches the path "MZ", which is not valid SVG.
  edges = np.array([-1.0, -1.0]), np.array([2.0, 4.0])
  assert "MZ" not in line_file("t", [line(1, 2)._replace(band=edges)], log=True)


def test_a_point_has_a_bar_and_its_name_beside_it():
  # Catches a point without its error bar, names that overlap or are outside the picture, and a
  # legend in addition to the names.
  def point(label, x, y):
    return Line(
      label, np.array([x]), np.array([y]), "#0072b2", band=(np.array([y - 1]), np.array([y + 1]))
    )

  made = line_file(
    "t",
    [point("first", 5.0, 3.0), point("second", 5.1, 3.01), point("third", 9.0, 3.0)],
    beside=True,
  )
  assert made.count("<circle") == 3 and 'stroke-width="4"' not in made
  assert len(re.findall(r'd="M[\d.]+ [\d.]+V[\d.]+" stroke="#0072b2"', made)) == 3
  at = {
    name: (float(x), float(y), anchor)
    for x, y, anchor, name in re.findall(
      r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)" style="fill:#0072b2">(\w+)<', made
    )
  }
  assert (
    abs(at["first"][1] - at["second"][1]) >= 12 and at["third"][2] == "end" and at["third"][0] < 640
  )
