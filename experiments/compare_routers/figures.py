"""Draws the study's figures as SVG.

They are the validation curves of each group, quality against time, and the load of every expert.
"""

from __future__ import annotations

import html
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.compare_routers import measures, study
from moe_jax.report.charts import Line, line_file
from moe_jax.report.colours import LOAD_LABELS, LOAD_SCALE, load_pixels, png, series_colour

# File -> what it shows, as the README's alternative text.
FILES = {
  f"curves_{i}.svg": f"validation curves, {group.title}" for i, group in enumerate(study.GROUPS, 1)
} | {
  "time.svg": "validation bits per byte over the time of a step",
  "load.svg": "load of each expert over training",
}
DENSE_COLOUR = "#000000"
# The layout of load.svg in pixels: the height of its head, the size of a panel and the gap between
# panels as (width, height), and the number of panels side by side.
HEAD, PANEL, GAP, COLUMNS = 62, (196, 120), (44, 52), 3


def write(lines: measures.Lines, folder: pathlib.Path) -> None:
  """Writes all of `FILES` into a folder."""
  pictures = [
    *(curves(lines, group) for group in study.GROUPS),
    quality_by_time(lines),
    loads(lines),
  ]
  for name, picture in zip(FILES, pictures, strict=True):
    (folder / name).write_text(picture)


def curves(lines: measures.Lines, group: study.Group) -> str:
  """Returns an SVG of the validation curves of a group and of the dense twin.

  A line is the mean over the finite seeds, and its band goes from the lowest to the highest seed.
  """
  drawn = [
    _curve(name, lines[name], colour) for name, colour in _colours(group).items() if name in lines
  ]
  drawn = [line for line in drawn if line is not None]
  # The axis ends at the highest value after a third of the steps, because the fall before that
  # would squeeze the rest of the curves.
  third = [line.y[np.searchsorted(line.x, line.x[-1] / 3)] for line in drawn]
  return line_file(
    f"{group.title.capitalize()}: mean and range of the seeds",
    drawn,
    y_label="validation, bits per byte",
    top=max(third, default=np.inf),
    height=400,
  )


def _curve(name: str, line: Mapping[str, Any], colour: str) -> Line | None:
  steps, values = measures.curve(line)
  if not values.size:
    return None
  return Line(
    name, steps, values.mean(axis=0), colour, band=(values.min(axis=0), values.max(axis=0))
  )


def quality_by_time(lines: measures.Lines) -> str:
  """Returns an SVG with a point for each row: bits per byte over the time of a step."""
  points = []
  for name, line in lines.items():
    bits, seconds, group = measures.bits(line), measures.seconds_a_step(line), study.group_of(name)
    if bits.mean is not None and seconds:
      edges = tuple(np.array([bits.mean + sign * (bits.error or 0.0)]) for sign in (-1, 1))
      colour = series_colour(study.GROUPS.index(group)) if group else DENSE_COLOUR
      points.append(
        Line(
          name + study.SEES.get(name, ""),
          np.array([1000 * seconds]),
          np.array([bits.mean]),
          colour,
          band=edges,
        )
      )
  return line_file(
    "Quality and time of each router: mean over seeds ± standard error",
    points,
    width=760,
    height=440,
    x_label="step of one seed, ms (CPU time on a CPU)",
    y_label="validation, bits per byte",
    beside=True,
  )


def loads(lines: measures.Lines) -> str:
  """Returns an SVG with a panel for each row: the load of every expert over training, of seed 0.

  A panel has one strip for each layer with experts.
  """
  routed = [
    name for name in lines if study.group_of(name) and lines[name].get("load", {}).get("step")
  ]
  high = HEAD + -(-len(routed) // COLUMNS) * (PANEL[1] + GAP[1])
  wide = GAP[0] + COLUMNS * (PANEL[0] + GAP[0])
  stops = LOAD_SCALE.split(", ")
  body = "".join(
    f'<stop offset="{i / (len(stops) - 1):g}" stop-color="{stop}"/>' for i, stop in enumerate(stops)
  )
  body = f'<defs><linearGradient id="scale">{body}</linearGradient></defs>'
  title = "Load of each expert over training, seed 0"
  body += f'<text x="{GAP[0]}" y="17" style="font-weight:bold">{title}</text>'
  body += f'<rect x="{GAP[0]}" y="26" width="200" height="8" fill="url(#scale)"/>'
  for i, label in enumerate(LOAD_LABELS):
    body += f'<text x="{GAP[0] + 50 * i}" y="46" text-anchor="middle">{label}</text>'
  body += f'<text x="{GAP[0] + 222}" y="35">times an equal share</text>'
  for i, name in enumerate(routed):
    left, top = (
      GAP[0] + i % COLUMNS * (PANEL[0] + GAP[0]),
      HEAD + i // COLUMNS * (PANEL[1] + GAP[1]),
    )
    body += f'<g transform="translate({left} {top})">{_panel(name, lines[name]["load"])}</g>'
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}" '
    f'height="{high}">'
    "<style>text{font:12px sans-serif;fill:#333}.small{font-size:10px}</style>"
    f'<rect width="{wide}" height="{high}" fill="#fff"/>{body}</svg>\n'
  )


def _panel(name: str, load: Mapping[str, Any]) -> str:
  """Returns the panel of a row: its layers one below the other, with steps to the right."""
  layers = np.array(load["layers"], float)  # [Lm, T, E]
  strip = PANEL[1] / len(layers)
  body = f'<text y="14">{html.escape(name)}</text>'
  for i, shares in enumerate(layers):
    picture = png(
      np.repeat(load_pixels(np.ascontiguousarray(shares.T) * shares.shape[1]), 2, axis=0)
    )
    top = 20 + i * strip
    body += (
      f'<image href="{picture}" y="{top:g}" width="{PANEL[0]}" height="{strip - 4:g}" '
      'preserveAspectRatio="none" style="image-rendering:pixelated"/>'
    )
    for y, label in ((top + 8, "0"), (top + strip - 4, str(shares.shape[1] - 1))):
      body += f'<text x="-4" y="{y:g}" text-anchor="end" class="small">{label}</text>'
    middle = top + strip / 2
    body += (
      f'<text x="-22" y="{middle:g}" transform="rotate(-90 -22 {middle:g})" text-anchor="middle" '
      f'class="small">expert</text>'
    )
  for x, anchor, label in (
    (0, "start", f"step {load['step'][0]}"),
    (PANEL[0], "end", str(load["step"][-1])),
  ):
    body += f'<text x="{x}" y="{PANEL[1] + 28}" text-anchor="{anchor}" class="small">{label}</text>'
  return body


def _colours(group: study.Group) -> dict[str, str]:
  """Returns row -> colour of a group and of the dense twin."""
  return {study.DENSE: DENSE_COLOUR} | {name: series_colour(i) for i, name in enumerate(group.rows)}
