"""Writes the metrics of a run to `metrics.jsonl` and to boards.

`metrics.jsonl` is the record, with one JSON object per line. Boards show the same numbers.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.training import workdir
from moe_jax.training.boards import Board, TensorBoard


class MetricsWriter:
  """Appends to the metrics of a run.

  Attributes:
    told: A sentence about damaged lines of the file, which were moved to `metrics.jsonl.damaged`;
      "" if there were none.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    step: int,
    batch: int | None = None,
    active: bool = True,
    boards: Sequence[Board] = (),
  ):
    """Opens the files, and first removes everything after `step`, so that no line is repeated.

    Args:
      directory: The workdir.
      step: The step from which the run continues.
      batch: The number of batches that the run has read. Lines of later batches are removed, too.
        None means that it equals `step`.
      active: Whether this process writes, which only the first one does.
      boards: Further boards beside TensorBoard.
    """
    # Both stay empty on processes that write nothing.
    self._file: Any = None
    self._boards: list[Board] = []
    self.told = ""
    if not active:
      return
    path = directory / "metrics.jsonl"
    lines, damaged = _parse(path)
    if damaged:
      aside = path.with_name(path.name + ".damaged")
      with aside.open("ab") as file:
        file.writelines(line + b"\n" for line in damaged)
      self.told = (
        f"{len(damaged)} damaged {'line' if len(damaged) == 1 else 'lines'} of {path} cannot be "
        f"read and {'was' if len(damaged) == 1 else 'were'} moved to {aside}; all others are kept"
      )
    self._path, self._directory, self._others = path, directory, boards
    batch = step if batch is None else batch
    self._keep([line for line in lines if line.get("batch", 0) <= batch], step)

  def _keep(self, lines: list[dict[str, Any]], step: int) -> None:
    """Rewrites the file with the lines up to `step`, and opens it to append to them."""
    workdir.write_atomically(
      self._path, "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step)
    )
    self._file = self._path.open("a", buffering=1, encoding="utf-8")
    self._boards = [TensorBoard(self._directory / "tb", step + 1), *self._others]

  def forget_after(self, step: int) -> None:
    """Removes everything after `step`, to which the run has gone back."""
    if self._file is None:
      return
    self._file.close()
    self._boards[0].close()
    self._keep(_parse(self._path)[0], step)

  def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
    """Writes the line `{"step", "kind"} | values`.

    Scalars and arrays also go to the boards; each entry of an array is a curve.
    """
    if self._file is None:
      return
    values = {name: np.asarray(value, np.float64) for name, value in values.items()}
    line = {"step": step, "kind": kind} | {
      name: plain(value.tolist()) for name, value in values.items()
    }
    self._file.write(json.dumps(line) + "\n")
    points = {
      "/".join([kind, name, *map(str, index)]): float(value[index])
      for name, value in values.items()
      for index in np.ndindex(value.shape)
    }
    for board in self._boards:
      board.write(step, points)

  def event(self, step: int, event: dict[str, Any]) -> None:
    """Writes a line of kind "event", which is something that happened to the run (`guard.py`)."""
    if self._file is not None:
      self._file.write(json.dumps({"step": step, "kind": "event"} | event) + "\n")

  def close(self) -> None:
    """Closes the files and the boards."""
    if self._file is not None:
      self._file.close()
    for board in self._boards:
      board.close()


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the lines of a `metrics.jsonl` that can be read, or [] if there is no file."""
  return _parse(path)[0]


def _parse(path: pathlib.Path) -> tuple[list[dict[str, Any]], list[bytes]]:
  """Returns `(lines, damaged)`, the parsed lines of the file and those that cannot be used.

  A line must be a JSON object with a text `kind`, a whole number `step` and, if it has a `batch`, a
  whole number there. Blank lines are left out. So is a last line without its end, which only means
  that the run was killed in the middle of writing it.
  """
  lines, damaged = [], []
  texts = path.read_bytes().split(b"\n") if path.exists() else []
  for number, text in enumerate(texts, 1):
    if not text.strip():
      continue
    try:
      line = json.loads(text)
    # ValueError includes the error about bytes that are not UTF-8.
    except (ValueError, RecursionError):
      line = None

    # A bool is an int for `isinstance`, but not a number of steps.
    def whole(name: str, line: Any = line) -> bool:
      return type(line.get(name, 0)) is int

    if (
      isinstance(line, dict)
      and "step" in line
      and whole("step")
      and whole("batch")
      and isinstance(line.get("kind"), str)
    ):
      lines.append(line)
    # The file ends with a newline, so the last part is empty unless a line was cut short.
    elif number < len(texts):
      damaged.append(text)
  return lines, damaged


def plain(value, digits: int = 7):
  """Returns a number, or nested lists of numbers, in a form that JSON can hold.

  None stands for numbers that are not finite. The default of seven digits is the precision of
  float32.
  """
  if isinstance(value, list):
    return [plain(v, digits) for v in value]
  return float(f"{value:.{digits}g}") if math.isfinite(value) else None
