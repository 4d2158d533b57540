"""Line charts and load maps as inline SVG, written without a plotting library.

The files stay small, and the text in them can still be selected and searched.

In the private helpers, `inner` is the (width, height) of the plotting area in pixels, and `xs` and
`ys` are the (low, high) ranges of the data that the area shows.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from moe_jax.report.colours import load_pixels, png
from moe_jax.report.tables import scale

# Font size in SVG units. The page shows a chart at about its own size, so a unit is about a pixel.
_FONT = 12
_TOP, _BOTTOM, _LEFT = 10, 40, 50  # margins around the plotting area, px
_MOST_HOVERED = 12  # lines whose values can be read with the pointer
_Span = tuple[float, float]  # the (low, high) ends of a range of the data


class Line(NamedTuple):
  """A line of a chart, or a single point if T = 1.

  Attributes:
    label: The name shown in the legend.
    x: [T] The positions along the x axis, usually training steps.
    y: [T] The values.
    colour: A CSS colour.
    faint: Whether the line is drawn thin and pale and is left out of the legend.
    band: The (low [T], high [T]) edges of an area that is shaded around the line, or None.
  """

  label: str
  x: Float[np.ndarray, "T"]
  y: Float[np.ndarray, "T"]
  colour: str
  faint: bool = False
  band: tuple[Float[np.ndarray, "T"], Float[np.ndarray, "T"]] | None = None


class Level(NamedTuple):
  """A dashed horizontal line with its name at the right edge."""

  label: str
  y: float


def line_chart(
  title: str,
  lines: Sequence[Line],
  *,
  levels: Sequence[Level] = (),
  note: str = "",
  log: bool = False,
  top: float = math.inf,
  bottom: float | None = None,
  width: int = 540,
  height: int = 240,
  x_label: str = "step",
) -> str:
  """Returns an HTML figure with a title, a legend and an SVG, or "" if there is nothing to draw.

  The legend is left out if there is only one line.

  Args:
    title: The caption of the figure.
    lines: The lines to draw. Values that are not finite leave gaps, and their number is shown under
      the title.
    levels: Reference lines. They widen the range of y.
    note: One line of text under the title, e.g. the unit.
    log: Whether the y axis is logarithmic. Values and edges of bands that are <= 0 then leave gaps.
    top: Upper bound of the range of y, for curves whose early values would squeeze the rest.
    bottom: Lower end of the range of y. None derives it from the data.
    width: Width of the SVG in pixels.
    height: Height of the SVG in pixels.
    x_label: The label of the x axis.
  """
  lines = [_positive(line) if log else line for line in lines if len(line.x)]
  levels = [level for level in levels if math.isfinite(level.y) and (level.y > 0 or not log)]
  num_missing = sum(int((~np.isfinite(line.y)).sum()) for line in lines)
  if not lines:
    return ""
  # The names of the levels are written at the right; a character is about 6.6 px wide.
  right = 16 + (max(len(level.label) for level in levels) * 6.6 if levels else 0)
  inner = (width - _LEFT - right, height - _TOP - _BOTTOM)
  # The zero makes every x axis begin at step 0.
  xs = _range([line.x for line in lines] + [np.zeros(1)])
  ys = _y_range(lines, levels, top, bottom, log)
  warning = (
    f'<p class="warn">{num_missing} values not finite{" or not positive" if log else ""}</p>'
    if num_missing
    else ""
  )
  legend = (
    "".join(
      f'<span><b style="background:{line.colour}"></b>{html.escape(line.label)}</span>'
      for line in lines
      if not line.faint
    )
    if sum(not line.faint for line in lines) > 1
    else ""
  )
  body = _axes(inner, xs, ys, log, x_label) + _levels(levels, inner, ys, log)
  body += _plot(lines, inner, xs, ys, log, x_label)
  shown = _hover_data(lines, (width, height), inner, xs, x_label)
  return (
    f"<figure><figcaption>{html.escape(title)}</figcaption>{_note(note)}{warning}"
    f"{f'<div class=legend>{legend}</div>' if legend else ''}"
    f"{_svg(title, width, height, body, shown)}</figure>"
  )


def line_file(
  title: str,
  lines: Sequence[Line],
  *,
  log: bool = False,
  width: int = 640,
  height: int = 300,
  x_label: str = "step",
  y_label: str = "",
  top: float = math.inf,
  beside: bool = False,
) -> str:
  """Returns a line chart as a standalone SVG file, e.g. for a README.

  The file has a white background and contains the title and the legend.

  Args:
    title: The title, written above the plot.
    lines: The lines to draw, as in `line_chart`.
    log: Whether the y axis is logarithmic. Values and edges of bands that are <= 0 then leave gaps.
    width: Width of the plot in pixels. A `y_label` adds to it.
    height: Height of the plot in pixels. The title and the legend add to it.
    x_label: The label of the x axis.
    y_label: The label of the y axis. "" leaves it out.
    top: Upper bound of the range of y, as in `line_chart`.
    beside: Whether each label stands beside the last point of its line in place of a legend.
  """
  lines = [_positive(line) if log else line for line in lines]
  inner = (width - _LEFT - 16, height - _TOP - _BOTTOM)
  xs, ys = _range([line.x for line in lines] + [np.zeros(1)]), _y_range(lines, (), top, None, log)
  body = _axes(inner, xs, ys, log, x_label) + _plot(lines, inner, xs, ys, log, x_label)
  # Columns of the legend, then in pixels: height of the title, height of a row of the legend, width
  # of the label of the y axis.
  columns, head, row, side = 3, 24, 18, 14 if y_label else 0
  if y_label:
    body += (
      f'<text transform="translate(-2 {_TOP + inner[1] / 2:g}) rotate(-90)" text-anchor="middle">'
      f"{html.escape(y_label)}</text>"
    )
  for i, line in enumerate(() if beside else lines):
    x, y = _LEFT + i % columns * inner[0] / columns, height + 10 + i // columns * row
    body += f'<path d="M{x:.1f} {y}h16" stroke="{line.colour}" stroke-width="4"/>'
    body += f'<text x="{x + 21:.1f}" y="{y + 4}">{html.escape(line.label)}</text>'
  body += _names(lines, inner, xs, ys, log) if beside else ""
  wide, total = (
    width + side,
    head + height + 6 + (0 if beside else row * math.ceil(len(lines) / columns)),
  )
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {total}" width="{wide}" '
    f'height="{total}">'
    "<style>text{font:12px "
    "sans-serif;fill:#333}.grid{stroke:#e6e6e6}.axis{stroke:#888;fill:none}</style>"
    f'<rect width="{wide}" height="{total}" fill="#fff"/><text x="{_LEFT + side}" y="17" '
    f'style="font-weight:bold">{html.escape(title)}</text><g transform="translate({side} '
    f'{head})">{body}</g>'
    "</svg>\n"
  )


def load_map(
  title: str,
  steps: Float[np.ndarray, "T"],
  load: Float[np.ndarray, "T E"],
  *,
  width: int = 540,
  note: str = "",
) -> str:
  """Returns a figure of the load of each expert over time, relative to the uniform share 1/E.

  Args:
    title: The caption of the figure.
    steps: [T] The training steps of the columns.
    load: [T, E] The fraction of all assignments that each expert gets.
    width: Width of the SVG in pixels.
    note: One line of text under the title.
  """
  experts = load.shape[1]
  height = int(np.clip(experts * 9, 110, 420)) + _TOP + _BOTTOM
  inner = (width - _LEFT - 16, height - _TOP - _BOTTOM)
  picture = png(load_pixels(np.ascontiguousarray(load.T) * experts))
  body = (
    f'<image href="{picture}" x="{_LEFT}" y="{_TOP}" width="{inner[0]}" height="{inner[1]}" '
    'preserveAspectRatio="none" style="image-rendering:pixelated"/>'
  )
  # Rows can be lower than a line of text: then only every k-th expert is labelled, 14 px apart.
  every = max(1, math.ceil(experts / (inner[1] / 14)))
  for expert in range(0, experts, every):
    y = _TOP + (expert + 0.5) / experts * inner[1]
    body += f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{expert}</text>'
  body += (
    f'<text x="12" y="{_TOP + inner[1] / 2}" transform="rotate(-90 12 {_TOP + inner[1] / 2})" '
    'text-anchor="middle">expert</text>'
  )
  body += _x_axis(inner, _range([steps]), "step")
  return (
    f"<figure><figcaption>{html.escape(title)}</figcaption>{_note(note)}"
    f"{_svg(title, width, height, body)}{scale()}</figure>"
  )


def _svg(title: str, width: int, height: int, body: str, shown: str = "") -> str:
  """Returns an SVG element with `title` as its label for screen readers.

  Args:
    title: The title.
    width: The width in pixels.
    height: The height in pixels.
    body: The content.
    shown: The data that `style.HOVER` shows; "" for none.
  """
  data = f' data-chart="{html.escape(shown)}"' if shown else ""
  return (
    f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}"{data}>'
    f"{body}</svg>"
  )


def _hover_data(lines, size, inner, xs: _Span, x_label: str) -> str:
  """Returns the values that the page shows at the place of the pointer, as JSON.

  Lines that are not in the legend are left out, and so are those beyond `_MOST_HOVERED`.
  """

  def short(values):
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values.tolist()]

  return json.dumps(
    {
      "label": x_label,
      "size": size,
      "area": [_LEFT, _TOP, round(inner[0], 1), inner[1]],
      "range": xs,
      "lines": [
        {"label": line.label, "colour": line.colour, "x": line.x.tolist(), "y": short(line.y)}
        for line in lines
        if not line.faint
      ][:_MOST_HOVERED],
    },
    separators=(",", ":"),
  )


def _note(note: str) -> str:
  """Returns the line under the title, or "" if there is no note."""
  return f'<p class="note">{html.escape(note)}</p>' if note else ""


def _positive(line: Line) -> Line:
  """Returns `line` with nan for each value and each edge of its band that has no logarithm."""

  def mask(y):
    return np.where(y > 0, y, np.nan)

  band = (mask(line.band[0]), mask(line.band[1])) if line.band else None
  return line._replace(y=mask(line.y), band=band)


def _range(values: Sequence[np.ndarray]) -> _Span:
  """Returns the least and the greatest finite value, widened if they are equal."""
  finite = np.concatenate([v[np.isfinite(v)] for v in values])
  low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
  return (low, high) if high > low else (low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1))


def _y_range(lines, levels, top, bottom, log) -> _Span:
  """Returns the range of y that shows the data and the levels, with a margin.

  If `log` is set, the values that are not positive have been replaced by nan.
  """
  bands = [edge for line in lines for edge in line.band or ()]
  values = [line.y for line in lines] + bands + [np.array([level.y for level in levels])]
  if bottom is not None and all(np.all(each[np.isfinite(each)] == bottom) for each in values):
    # The drop rate of a run without drops is such a line.
    return bottom, bottom + 1.0
  low, high = _range(values)
  if top > low:
    high = min(high, top)
  if log:
    # `_range` returns (0, 1) if no value is finite, but a logarithmic axis needs low > 0.
    return (low / 1.15, high * 1.15) if low > 0 else (0.1, 10.0)
  margin = 0.04 * (high - low)
  return (low - margin if bottom is None else min(bottom, low)), high + margin


def _scale(value, low: float, high: float, *, log: bool = False):
  """Returns the position of `value` between `low` (0) and `high` (1)."""
  if log:
    with np.errstate(invalid="ignore", divide="ignore"):
      return (np.log(value) - math.log(low)) / (math.log(high) - math.log(low))
  return (value - low) / (high - low)


def _plot(lines, inner, xs: _Span, ys: _Span, log, x_label) -> str:
  """Draws the lines in a nested SVG, which clips them at the edges of the plot."""
  width, height = inner
  body = ""
  for line in lines:
    x, y = width * _scale(line.x, *xs), height * (1 - _scale(line.y, *ys, log=log))
    if line.band:
      body += _band(
        x, [height * (1 - _scale(edge, *ys, log=log)) for edge in line.band], line.colour
      )
    # `pen` says whether the previous point was drawn: "L" continues a line and "M" starts one.
    path, pen = [], False
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
      drawn = math.isfinite(a) and math.isfinite(b)
      if drawn:
        path.append(f"{'L' if pen else 'M'}{a:.1f} {np.clip(b, -9999, 9999):.1f}")
      pen = drawn
    style = 'stroke-width="1" opacity=".35"' if line.faint else 'stroke-width="1.8"'
    style += ' stroke-linejoin="round"'
    body += f'<path d="{"".join(path)}" fill="none" stroke="{line.colour}" {style}/>'
    # A line of few points gets markers with tooltips.
    if np.isfinite(y).sum() <= 30 and not line.faint:
      body += "".join(
        f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.6" fill="{line.colour}"><title>'
        f"{html.escape(line.label)}: {value:.4g} at {x_label} {step:g}</title></circle>"
        for a, b, value, step in zip(x.tolist(), y.tolist(), line.y, line.x, strict=True)
        if math.isfinite(b) and -9 <= b <= height + 9
      )
  return (
    f'<svg x="{_LEFT}" y="{_TOP - 3}" width="{width + 3}" height="{height + 6}" '
    f'viewBox="0 -3 {width + 3} {height + 6}">{body}</svg>'
  )


def _band(x, edges, colour: str) -> str:
  """Draws the area between two edges, or a vertical bar if there is only one point.

  Points at which an edge is not finite are left out.
  """
  drawn = np.isfinite(edges[0]) & np.isfinite(edges[1])
  low, high = (np.clip(edge[drawn], -9999, 9999).tolist() for edge in edges)
  x = x[drawn].tolist()
  if not x:
    return ""
  if len(x) == 1:
    return (
      f'<path d="M{x[0]:.1f} {low[0]:.1f}V{high[0]:.1f}" stroke="{colour}" stroke-width="1.2"/>'
    )
  around = [*zip(x, high, strict=True), *zip(x[::-1], low[::-1], strict=True)]
  return (
    f'<path d="M{"L".join(f"{a:.1f} {b:.1f}" for a, b in around)}Z" fill="{colour}" opacity=".15"/>'
  )


def _names(lines, inner, xs: _Span, ys: _Span, log) -> str:
  """Writes each line's label beside its last finite point, moved down to avoid other labels."""
  width, height = inner
  ends = []
  for line in lines:
    for i in np.flatnonzero(np.isfinite(line.y))[-1:]:
      y = _TOP + height * (1 - float(_scale(line.y[i], *ys, log=log)))
      ends.append((y, _LEFT + width * float(_scale(line.x[i], *xs)), line))
  # `taken` holds the (left, right, y) of the labels that are placed already, from top to bottom.
  body, taken = "", []
  for y, x, line in sorted(ends, key=lambda end: end[:2]):
    label_width = 7.2 * len(line.label)
    # The label stands at the right of its point if there is room, and at the left otherwise.
    right = x + 8 + label_width < _LEFT + width
    left, label_y = (x + 8 if right else x - 8 - label_width), y
    for other_left, other_right, other in sorted(taken, key=lambda label: label[2]):
      if (
        other_left < left + label_width and left < other_right and abs(label_y - other) < _FONT + 1
      ):
        label_y = other + _FONT + 1
    taken.append((left, left + label_width, label_y))
    anchor_x = x + 8 if right else x - 8
    # A label that was moved is joined to its point by a line.
    if label_y != y:
      body += f'<path d="M{x:.1f} {y:.1f}L{anchor_x:.1f} {label_y:.1f}" class="axis"/>'
    body += (
      f'<text x="{anchor_x:.1f}" y="{label_y + 4:.1f}" text-anchor="{"start" if right else "end"}" '
      f'style="fill:{line.colour}">{html.escape(line.label)}</text>'
    )
  return body


def _levels(levels, inner, ys: _Span, log) -> str:
  """Draws the levels as dashed lines and pushes their names apart so that none covers another."""
  width, height = inner
  placed = sorted(
    (_TOP + height * (1 - float(_scale(level.y, *ys, log=log))), level.label) for level in levels
  )
  placed = [(y, label) for y, label in placed if _TOP - 3 <= y <= _TOP + height + 3]
  spots = [y for y, _ in placed]
  # Each pass moves the two labels of an overlapping pair apart by half of the overlap each.
  for _ in range(50):
    for i in range(len(spots) - 1):
      overlap = _FONT + 1 - (spots[i + 1] - spots[i])
      if overlap > 0:
        spots[i], spots[i + 1] = spots[i] - overlap / 2, spots[i + 1] + overlap / 2
  body = ""
  for (y, label), spot in zip(placed, spots, strict=True):
    body += f'<path d="M{_LEFT} {y:.1f}h{width:.1f}l8 {spot - y:.1f}" class="level"/>'
    body += f'<text x="{_LEFT + width + 11:.1f}" y="{spot + 4:.1f}">{html.escape(label)}</text>'
  return body


def _axes(inner, xs: _Span, ys: _Span, log, x_label) -> str:
  """Draws the grid lines and labels of the y axis, and the x axis."""
  width, height = inner
  body = ""
  for tick in _log_ticks(*ys) if log else round_numbers(*ys, max(2, int(height / 38))):
    y = _TOP + height * (1 - float(_scale(tick, *ys, log=log)))
    body += f'<path d="M{_LEFT} {y:.1f}h{width:.1f}" class="grid"/>'
    body += f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick_label(tick)}</text>'
  return body + _x_axis(inner, xs, x_label)


def _x_axis(inner, xs: _Span, label) -> str:
  """Draws the x axis with its ticks and its label."""
  width, height = inner
  base = _TOP + height
  body = f'<path d="M{_LEFT} {base:.1f}h{width:.1f}" class="axis"/>' + (
    f'<text x="{_LEFT + width / 2:.1f}" y="{base + 33:.1f}" '
    f'text-anchor="middle">{html.escape(label)}</text>'
  )
  for tick in round_numbers(*xs, max(2, int(width / 60))):
    x = _LEFT + width * float(_scale(tick, *xs))
    body += f'<path d="M{x:.1f} {base:.1f}v4" class="axis"/>'
    body += f'<text x="{x:.1f}" y="{base + 17:.1f}" text-anchor="middle">{tick_label(tick)}</text>'
  return body


def round_numbers(low: float, high: float, count: int) -> list[float]:
  """Returns about `count` round numbers between `low` and `high`."""
  raw = (high - low) / max(1, count)
  power = 10.0 ** math.floor(math.log10(raw))
  step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
  return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
  """Returns the powers of ten from `low` to `high`, and 2 and 5 times them if there are few."""
  decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  steps = (1, 2, 5) if math.log10(high / low) < 2.2 else (1,)
  ticks = [m * 10.0**d for d in decades for m in steps if low <= m * 10.0**d <= high]
  return ticks if len(ticks) > 1 else round_numbers(low, high, 4)


def tick_label(value: float) -> str:
  """Returns the label of a tick, such as 0.002, 1.5, 20k, 3M or 1e-6."""
  size = abs(value)
  for unit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
    if size >= unit:
      return f"{value / (1e3 if letter == 'k' else unit):g}{letter}"
  return "0" if size < 1e-12 else f"{value:.4g}"
