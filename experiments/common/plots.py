"""Gives all studies one style of figures, and makes the page of changed rows."""

from __future__ import annotations

import html
import importlib
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.errors import ConfigError
from moe_jax.report.charts import Line, line_chart
from moe_jax.report.sections import document

STYLE = pathlib.Path(__file__).resolve().parent / "plots.mplstyle"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito
LOSSES = ("cross_entropy", "loss")


def need(module: str) -> types.ModuleType:
  """Imports a module of the extra [studies].

  Raises:
    ConfigError: The module is not installed.
  """
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise ConfigError(
      "experiments", module, "is not installed; run pip install -e '.[studies]'"
    ) from error


def pyplot() -> types.ModuleType:
  """Returns matplotlib's pyplot, which draws into files and has the studies' style.

  Raises:
    ConfigError: Matplotlib is not installed.
  """
  need("matplotlib").use("Agg")
  plt = need("matplotlib.pyplot")
  plt.style.use(STYLE)
  return plt


def save(figure: Any, path: pathlib.Path) -> None:
  """Writes a figure and closes it."""
  figure.savefig(path)
  pyplot().close(figure)


def page(
  title: str,
  lines: Mapping[str, Mapping[str, Any]],
  verdicts: Mapping[str, str],
  table: Sequence[Sequence[str]] = (),
) -> str:
  """Returns an HTML page of rows: a table, what each came to, its flags, and all loss curves.

  Args:
    title: The title.
    lines: Row -> its line of results.
    verdicts: Row -> what it came to, in words.
    table: The cells of a table of the rows, its head first.
  """
  rows = _table(table)
  for name, line in lines.items():
    flags = html.escape("\n".join(line.get("arguments", ())))
    rows += (
      f"<h3>{html.escape(name)}</h3><p>{html.escape(verdicts.get(name, ''))}</p>"
      f"<details><summary>Flags</summary><pre>{flags}</pre></details>"
    )
  chart = line_chart(
    "Training loss", loss_curves(lines), note="nats per token: mean and range of the seeds"
  )
  figures = f'<h2>Curves</h2><div class="figures two">{chart}</div>' if chart else ""
  return document(title, f"<h1>{html.escape(title)}</h1><h2>Rows</h2>{rows}{figures}")


def _table(lines: Sequence[Sequence[str]]) -> str:
  """Returns a table as HTML, or "" if it has no lines."""
  if not lines:
    return ""
  cells = [[html.escape(cell) for cell in each] for each in lines]
  head = "".join(f"<th>{cell}</th>" for cell in cells[0])
  rows = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in each)}</tr>" for each in cells[1:])
  return f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>'


def loss_curves(lines: Mapping[str, Mapping[str, Any]]) -> list[Line]:
  """Returns each row's training loss: the mean over its seeds and their range.

  Rows without curves, such as runs of one seed by `moe_jax.train`, are left out.

  Args:
    lines: Row -> its line of results.
  """
  drawn = []
  for name, line in lines.items():
    curves = line.get("train", {})
    key = next((key for key in LOSSES if key in curves), None)
    if key is None or not curves["step"]:
      continue
    values = np.array(curves[key], float)  # [seeds, steps]; None becomes NaN
    drawn.append(
      Line(
        name,
        np.array(curves["step"], float),
        values.mean(axis=0),
        COLOURS[len(drawn) % len(COLOURS)],
        band=(values.min(axis=0), values.max(axis=0)),
      )
    )
  return drawn
