"""Draws horizontal stacked bars as inline SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

# In px: the height of a row and of its bar, and the margins above and below all rows.
_ROW, _BAR, _TOP, _FOOT = 34, 20, 8, 30


class Part(NamedTuple):
  """A piece of a bar.

  Attributes:
    name: What the piece stands for, as in the legend.
    value: The length in the chart's unit. A value that is not finite is not drawn.
    colour: A CSS colour.
    words: The text that is shown when the mouse is over the piece.
  """

  name: str
  value: float
  colour: str
  words: str


class Bar(NamedTuple):
  """A row of the chart.

  Attributes:
    label: The text to the left of the bar.
    parts: The pieces from left to right.
    words: The text to the right of the bar.
  """

  label: str
  parts: Sequence[Part]
  words: str


def bars(
  title: str,
  rows: Sequence[Bar],
  unit: str,
  *,
  limit: tuple[str, float] | None = None,
  note: str = "",
  width: int = 1080,
  left: int = 190,
) -> str:
  """Returns an HTML figure of bars on one scale from 0, or "" if nothing has a length.

  Args:
    title: The text above the figure.
    rows: The rows from top to bottom. Lengths that are not finite are left out.
    unit: The unit of the lengths, which is written beside the axis.
    limit: A name and a length at which a line crosses all rows.
    note: A line of text under the title. "" means none.
    width: The width of the figure in px.
    left: The width that is reserved for the labels, in px.
  """
  lengths = [math.fsum(_finite(part.value) for part in row.parts) for row in rows]
  top = max([*lengths, limit[1] if limit else 0.0], default=0.0)
  if not top:
    return ""
  # 170 px to the right of the scale are for the texts behind the bars.
  inner, height = width - left - 170, _TOP + _ROW * len(rows) + _FOOT
  scale = inner / (1.04 * top)
  body = _axis(top, scale, left, height - _FOOT, unit, inner)
  for i, row in enumerate(rows):
    body += _row(row, _TOP + i * _ROW, left, scale)
  if limit:
    x = left + limit[1] * scale
    body += (
      f'<path d="M{x:.1f} {_TOP - 4}V{height - _FOOT}" class="level" '
      f'style="stroke:#8a1c00;stroke-width:1.6"/><text x="{x:.1f}" y="{height - 3}" '
      f'text-anchor="middle" style="fill:#8a1c00">{html.escape(limit[0])}'
      "</text>"
    )
  note_html = f'<p class="note">{html.escape(note)}</p>' if note else ""
  return (
    f"<figure><figcaption>{html.escape(title)}</figcaption>{note_html}{legend(rows)}"
    f'<svg viewBox="0 0 {width} {height}" role="img" '
    f'aria-label="{html.escape(title)}">{body}</svg></figure>'
  )


def legend(rows: Sequence[Bar]) -> str:
  """Returns the legend, a square for each name in order of appearance, or "" for a single name."""
  colours = {part.name: part.colour for row in rows for part in row.parts if _finite(part.value)}
  if len(colours) < 2:
    return ""
  spans = "".join(
    f'<span><b style="background:{colour};height:11px"></b>{html.escape(name)}</span>'
    for name, colour in colours.items()
  )
  return f'<div class="legend">{spans}</div>'


def _row(row: Bar, y: int, left: int, scale: float) -> str:
  """Returns the SVG of one row: its label, its pieces and the text to the right of them."""
  body, x = (
    f'<text x="{left - 10}" y="{y + 15}" text-anchor="end">{html.escape(row.label)}</text>',
    float(left),
  )
  for part in row.parts:
    size = _finite(part.value) * scale
    if size:
      body += (
        f'<rect x="{x:.1f}" y="{y}" width="{size:.1f}" height="{_BAR}" fill="{part.colour}">'
        f"<title>{html.escape(part.words)}</title></rect>"
      )
      x += size
  return body + f'<text x="{x + 8:.1f}" y="{y + 15}">{html.escape(row.words)}</text>'


def _axis(top: float, scale: float, left: int, base: int, unit: str, inner: int) -> str:
  """Returns the SVG of the axis from 0 to `top`, with a grid line at each tick."""
  # The step between ticks is 1, 2 or 5 times a power of ten, and gives at most about six ticks.
  step = 10.0 ** math.floor(math.log10(top / 4))
  step *= next(m for m in (1, 2, 5, 10) if m * step >= top / 6)
  body = f'<path d="M{left} {base}h{inner}" class="axis"/>'
  for i in range(int(top / step + 1e-9) + 1):
    x = left + i * step * scale
    body += (
      f'<path d="M{x:.1f} {_TOP - 4}V{base}" class="grid"/><text x="{x:.1f}" y="{base + 15}" '
      f'text-anchor="middle">{i * step:g}</text>'
    )
  return body + f'<text x="{left + inner + 8}" y="{base + 15}">{html.escape(unit)}</text>'


def _finite(value: int | float) -> float:
  """Returns `value`, or 0 if it is not finite."""
  return value if math.isfinite(value) else 0.0
