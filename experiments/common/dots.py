"""Draws a dot chart: one line of dots for each name, as a standalone SVG file for a README."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from experiments.common.plots import COLOURS
from moe_jax.report.charts import round_numbers, tick_label

# In pixels: the height of the head with title and legend, of a line, and of the axis below.
_HEAD, _LINE, _FOOT = 52, 22, 46
_STYLE = (
  "text{font:12px sans-serif;fill:#333}.grid{stroke:#e6e6e6}.axis{stroke:#888;fill:none}"
  ".line{stroke:#ddd;stroke-width:2}"
)


def dot_file(
  title: str,
  rows: Mapping[str, Mapping[str, float]],
  x_label: str,
  *,
  mark: float | None = None,
  bold: Sequence[str] = (),
  width: int = 760,
) -> str:
  """Returns the SVG of a dot chart with a white background, a title and a legend.

  Args:
    title: The title, written above the plot.
    rows: Name of a line -> name of a series -> value. Lines may lack series; NaN is not allowed.
    x_label: What the values are, with their unit.
    mark: A value at which a vertical line is drawn, such as that of no difference.
    bold: The series with larger dots, which are drawn over the others.
    width: The width of the picture in pixels.
  """
  series = list(dict.fromkeys(name for values in rows.values() for name in values))
  colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(series)}
  values = [value for line in rows.values() for value in line.values()]
  values += [] if mark is None else [mark]
  margin = (max(values) - min(values) or 1.0) / 20
  low, high = min(values) - margin, max(values) + margin
  # A character of 12 pixels is about 7 pixels wide.
  left = 24 + 7 * max(map(len, rows))
  inner, base = width - left - 24, _HEAD + _LINE * len(rows)

  def x(value: float) -> float:
    return left + inner * (value - low) / (high - low)

  body = f'<text x="12" y="18" style="font-weight:bold">{html.escape(title)}</text>'
  place = 16
  for name, colour in colours.items():
    body += f'<circle cx="{place}" cy="36" r="{6 if name in bold else 4}" fill="{colour}"/>'
    body += f'<text x="{place + 10}" y="40">{html.escape(name)}</text>'
    place += 30 + 7 * len(name)
  for tick in round_numbers(low, high, inner // 80):
    body += f'<path d="M{x(tick):.1f} {_HEAD}V{base}" class="grid"/>'
    body += (
      f'<text x="{x(tick):.1f}" y="{base + 18}" text-anchor="middle">{tick_label(tick)}</text>'
    )
  if mark is not None:
    body += f'<path d="M{x(mark):.1f} {_HEAD}V{base}" class="axis"/>'
  for number, (name, line) in enumerate(rows.items()):
    y = _HEAD + _LINE * (number + 0.5)
    body += f'<text x="{left - 8}" y="{y + 4:g}" text-anchor="end">{html.escape(name)}</text>'
    ends = x(min(line.values())), x(max(line.values()))
    body += f'<path d="M{ends[0]:.1f} {y:g}H{ends[1]:.1f}" class="line"/>'
    for one in sorted(line, key=lambda one: one in bold):
      size = 6 if one in bold else 4
      body += f'<circle cx="{x(line[one]):.1f}" cy="{y:g}" r="{size}" fill="{colours[one]}"/>'
  body += (
    f'<text x="{left + inner / 2:.1f}" y="{base + 38}" text-anchor="middle">'
    f"{html.escape(x_label)}</text>"
  )
  tall = base + _FOOT
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {tall}" width="{width}" '
    f'height="{tall}" role="img" aria-label="{html.escape(title)}"><style>{_STYLE}</style>'
    f'<rect width="{width}" height="{tall}" fill="#fff"/>{body}</svg>\n'
  )
