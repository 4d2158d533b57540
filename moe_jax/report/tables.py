"""Tables of counts by expert on the colours of expert load, and the scale of these colours."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from moe_jax.analysis.information import relative
from moe_jax.report.colours import LOAD_LABELS, LOAD_SCALE, ink, load_pixels

MOST_EXPERTS = 64  # more columns than these could not be read


def expert_table(
  head: str,
  names: Sequence[str],
  counts: Int[np.ndarray, "R E"],
  times_chance: Float[np.ndarray, "R E"] | None = None,
) -> str:
  """Returns a table with the percentages of each row that go to each expert, as HTML.

  Args:
    head: What the rows are, for the first cell of the head.
    names: The name of each of the R rows. Rows without counts are left out.
    counts: The number of tokens of each row and expert.
    times_chance: What the colour of a cell shows, of which 1 is white. None means the counts
      divided by those for which each row would have the experts' shares of all rows.
  """
  times_chance = relative(counts) if times_chance is None else times_chance
  sizes = counts.sum(axis=1)
  share = counts / np.maximum(1, sizes)[:, None]
  columns = "".join(f"<th>{expert}</th>" for expert in range(counts.shape[1]))
  rows = ""
  for name, size, shares, colours in zip(
    names, sizes, share, load_pixels(times_chance), strict=True
  ):
    if size:
      cells = "".join(_cell(value, colour) for value, colour in zip(shares, colours, strict=True))
      rows += f"<tr><td>{html.escape(name)} ({size})</td>{cells}</tr>"
  return (
    f'<div class="wide"><table class="kinds"><tr><th>{html.escape(head)}</th>{columns}</tr>{rows}'
    "</table></div>"
  )


def _cell(share: float, colour: np.ndarray) -> str:
  """Returns a cell of the table: a percentage, without the sign, on its colour."""
  background = "#" + "".join(f"{int(channel):02x}" for channel in colour)
  return (
    f'<td class="cell" style="background:{background};color:{ink(background)}">'
    f"{100 * share:.0f}</td>"
  )


def scale() -> str:
  """Returns the scale of the colours of expert load."""
  labels = "".join(f"<span>{label}</span>" for label in LOAD_LABELS)
  gradient = f"background:linear-gradient(90deg, {LOAD_SCALE})"
  return f'<div class="scale"><i style="{gradient}"></i><div>{labels}</div></div>'
