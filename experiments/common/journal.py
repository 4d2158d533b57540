"""Reads and writes files of results, which are JSON Lines with one line per row."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from moe_jax.errors import ConfigError

Line = Mapping[str, Any]
Report = Callable[[str, Line], None]  # takes a row's name and its line


def load(results: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Returns row -> its line of the file, or {} if there is no file.

  A last line that a kill cut short is left out, so that its row runs again.

  Raises:
    ConfigError: Another line of the file is not JSON.
  """
  lines = results.read_text().splitlines() if results.exists() else []
  by_row = {}
  for number, line in enumerate(lines, 1):
    try:
      entry = json.loads(line)
    except json.JSONDecodeError as error:
      if number == len(lines):
        break
      raise ConfigError(
        "results",
        f"{results}:{number}",
        "is not a line of JSON; remove the line, and its row runs again",
      ) from error
    by_row[entry["row"]] = entry
  return by_row


def append(results: pathlib.Path, line: Line) -> None:
  """Adds a line to the file. A reader sees either the whole line or nothing of it."""
  text = results.read_text() if results.exists() else ""
  # A last line that a kill cut short ends without a newline, and is dropped here.
  whole_lines = text[: text.rfind("\n") + 1]
  _replace(results, whole_lines + json.dumps(line) + "\n")


def rewrite(results: pathlib.Path, lines: Iterable[Line]) -> None:
  """Replaces all lines of the file at once."""
  _replace(results, "".join(json.dumps(line) + "\n" for line in lines))


def _replace(results: pathlib.Path, text: str) -> None:
  partial = results.with_suffix(".partial")
  partial.write_text(text)
  os.replace(partial, results)
