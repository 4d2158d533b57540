"""Markdown tables and the markers in READMEs between which they are written."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# The one place in experiments/ that imports the function which replaces text between markers.
from moe_jax.routers import replace

__all__ = ["line", "markdown", "replace", "replace_all", "text", "versions", "write"]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], rule: str = "") -> str:
  """Returns a Markdown table.

  Args:
    head: The titles of the columns.
    rows: The cells of each row.
    rule: The second line of the table, which aligns the columns. "" aligns the first column to the
      left and all others to the right.
  """
  rule = rule or line(["---"] + ["---:"] * (len(head) - 1))
  return "\n".join([line(head), rule, *map(line, rows)])


def text(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """Returns a table for a terminal, with the first column aligned to the left, others right."""
  lines = [head, *rows]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return "\n".join(
    "  ".join(
      cell.rjust(width) if i else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ).rstrip()
    for cells in lines
  )


def line(cells: Iterable[str]) -> str:
  """Returns one line of a Markdown table."""
  return "| " + " | ".join(cells) + " |"


def replace_all(text: str, tables: Mapping[str, str]) -> str:
  """Returns `text` with each table between the markers of its name."""
  for name, table in tables.items():
    text = replace(text, name, table)
  return text


def write(file: pathlib.Path, tables: Mapping[str, str]) -> None:
  """Writes each table between the markers of its name in a Markdown file."""
  file.write_text(replace_all(file.read_text(), tables))


def versions(run: Mapping[str, Any]) -> str:
  """Returns the versions of jax and flax that a run used, as in "jax 0.10.2, flax 0.12.8"."""
  return ", ".join(f"{name} {run['versions'][name]}" for name in ("jax", "flax"))
