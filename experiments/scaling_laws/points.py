"""Reads tables of trained models, and selects the points that a law is about.

A table is a CSV or JSONL file, or the results.jsonl of a sweep. Its columns are `n` (parameters,
counted as the law's paper counts them) or any of `SIZES`; `d` (tokens); `experts`; `granularity`;
and `loss` (nats per token). `Points` explains them. Other columns are not read.
"""

from __future__ import annotations

import csv
import json
import math
import pathlib
from collections.abc import Iterator

import numpy as np

from experiments.scaling_laws import grid
from experiments.scaling_laws.laws import LAWS, SIZES, Points
from moe_jax.errors import ConfigError

COLUMNS = ("n", *SIZES, "d", "experts", "granularity", "loss")


def read(file: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns column -> values, for those of `COLUMNS` that the first line has.

  Diverged runs of a sweep are left out.

  Raises:
    ConfigError: The file does not exist or is of another kind, a column is missing, a line is
      malformed, or no line is left. A malformed line is named by its number.
  """
  if file.suffix not in (".csv", ".jsonl"):
    raise ConfigError("file", str(file), "is not a .csv or .jsonl file")
  if not file.is_file():
    raise ConfigError("file", str(file), "does not exist")
  lines = list(_csv(file) if file.suffix == ".csv" else _jsonl(file))
  if not lines:
    raise ConfigError("file", str(file), "has no points; it needs a line for each trained model")
  columns = [column for column in COLUMNS if column in lines[0][1]]
  if "loss" not in columns or not {"n", *SIZES} & set(columns):
    raise ConfigError(
      "file",
      str(file),
      f"has the columns {', '.join(columns) or 'of no law'}; a law needs loss and n "
      f"(or {', '.join(SIZES)})",
    )
  values = [[_value(file, number, line, column) for column in columns] for number, line in lines]
  return dict(zip(columns, np.array(values).T, strict=True))


def select(table: dict[str, np.ndarray], name: str) -> tuple[Points, str]:
  """Returns the points that a law is about, and words that say which these are.

  `Law.held` decides which points these are.

  Args:
    table: Column -> values, as `read` returns them.
    name: A key of `LAWS`.

  Raises:
    ConfigError: A column that the law reads is missing.
  """
  law, count = LAWS[name], len(table["loss"])
  size = law.size if law.size in table else "n"
  for column in (size, *law.reads):
    if column not in table and (column != "n" or size == "n"):
      raise ConfigError(
        "fit",
        name,
        f"there is no column {column}, which it reads; the columns are {', '.join(table)}",
      )
  kept, conditions = np.ones(count, bool), []
  for column, pick in law.held.items():
    if column in table and len(np.unique(table[column][kept])) > 1:
      value = pick(table[column][kept].tolist())
      kept &= table[column] == value
      conditions.append(f"{column} {value:g}")

  def of(column):
    return table[column][kept] if column in table else np.ones(kept.sum())

  note = (
    f"{kept.sum()} of {count} points, those of {' and '.join(conditions)}"
    if conditions
    else f"{count} points"
  )
  return Points(of(size), *(of(column) for column in ("d", "experts", "granularity", "loss"))), note


def _csv(file: pathlib.Path) -> Iterator[tuple[int, dict]]:
  with open(file, newline="") as lines:
    reader = csv.DictReader(lines)
    for line in reader:
      if None in line or None in line.values():
        raise ConfigError(
          "file",
          f"{file}:{reader.line_num}",
          f"does not have the {len(reader.fieldnames)} values that the header names",
        )
      yield reader.line_num, {column.strip(): value for column, value in line.items()}


def _jsonl(file: pathlib.Path) -> Iterator[tuple[int, dict]]:
  for number, text in enumerate(file.read_text().splitlines(), 1):
    try:
      line = json.loads(text)
    except json.JSONDecodeError as error:
      raise ConfigError("file", f"{file}:{number}", f"is not a line of JSON: {error}") from error
    if not isinstance(line, dict):
      raise ConfigError("file", f"{file}:{number}", "is not a JSON object")
    if "diverged" not in line:
      yield number, grid.point(line) if "arguments" in line else line


def _value(file: pathlib.Path, number: int, line: dict, column: str) -> float:
  try:
    value = float(line[column])
  except (KeyError, TypeError, ValueError) as error:
    raise ConfigError(
      "file", f"{file}:{number}", f"its {column} is {line.get(column)!r}, which is not a number"
    ) from error
  if not (math.isfinite(value) and value > 0):
    raise ConfigError(
      "file", f"{file}:{number}", f"its {column} is {value:g}; it must be above 0 and finite"
    )
  return value
