"""Where numbers go: `metrics.jsonl` (the record, one JSON object a line) and TensorBoard (a view of
it)."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import numpy as np

from moe_jax.training import workdir


class MetricsWriter:
  """Appends to a run's metrics; everything after `step` is forgotten first, so a resumed run
  repeats no line.

  Args:
    directory: the workdir.
    step: the run goes on from here.
    batch: and from this batch; events of later ones are forgotten, too. None: that of the step.
    active: False on all processes but the first: nothing is written.

  Attributes:
    told: a sentence about lines of the file that were damaged and are set aside in
      `metrics.jsonl.damaged`; "" if there were none.
  """

  def __init__(
    self, directory: pathlib.Path, step: int, batch: int | None = None, active: bool = True
  ):
    self._file = self._board = None
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
    self._path, self._directory = path, directory
    batch = step if batch is None else batch
    self._keep([line for line in lines if line.get("batch", 0) <= batch], step)

  def _keep(self, lines: list[dict[str, Any]], step: int) -> None:
    """Writes the lines up to `step`, and opens the file to append to them."""
    import tensorboardX

    workdir.write_atomically(
      self._path, "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step)
    )
    self._file = self._path.open("a", buffering=1, encoding="utf-8")
    self._board = tensorboardX.SummaryWriter(
      str(self._directory / "tb"), purge_step=step + 1, flush_secs=10
    )

  def forget_after(self, step: int) -> None:
    """Forgets everything after `step`, to which the run has gone back."""
    if self._file is None:
      return
    self.close()
    self._keep(_parse(self._path)[0], step)

  def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
    """One line: `{"step", "kind"} | values`. Scalars also go to TensorBoard, as do arrays, one
    curve an entry."""
    if self._file is None:
      return
    values = {name: np.asarray(value, np.float64) for name, value in values.items()}
    line = {"step": step, "kind": kind} | {
      name: plain(value.tolist()) for name, value in values.items()
    }
    self._file.write(json.dumps(line) + "\n")
    for name, value in values.items() if self._board_lives() else ():
      for index in np.ndindex(value.shape):
        tag = "/".join([kind, name, *map(str, index)])
        self._board.add_scalar(tag, value[index], step)

  def event(self, step: int, event: dict[str, Any]) -> None:
    """One line of kind "event": something that happened to the run, see `guard.py`."""
    if self._file is not None:
      self._file.write(json.dumps({"step": step, "kind": "event"} | event) + "\n")

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
      if self._board_lives():
        self._board.close()

  def _board_lives(self) -> bool:
    """Whether TensorBoard's events are still written.

    A full disk ends the thread that writes them. Its queue, which nobody empties any more, would
    then block this thread for ever; the record itself, metrics.jsonl, tells of the disk.
    """
    writer = self._board.file_writer
    return writer is not None and writer.event_writer._worker.is_alive()


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of a `metrics.jsonl` that can be read; [] if there is no file."""
  return _parse(path)[0]


def _parse(path: pathlib.Path) -> tuple[list[dict[str, Any]], list[bytes]]:
  """`(lines, damaged)`: the lines that are JSON objects with a whole number `step`, and those that
  are not.

  Blank lines are neither, nor is a last line without its end, which a kill has cut short.
  """
  lines, damaged = [], []
  texts = path.read_bytes().split(b"\n") if path.exists() else []
  for number, text in enumerate(texts, 1):
    if not text.strip():
      continue
    try:
      line = json.loads(text)
    except (ValueError, RecursionError):  # ValueError covers what is not UTF-8
      line = None

    def whole(name, line=line):
      return type(line.get(name, 0)) is int

    if (
      isinstance(line, dict)
      and "step" in line
      and whole("step")
      and whole("batch")
      and isinstance(line.get("kind"), str)
    ):
      lines.append(line)
    elif number < len(texts):
      damaged.append(text)
  return lines, damaged


def plain(value, digits: int = 7):
  """Numbers, in lists or not, as JSON can say them: None stands for what is not finite. float32
  holds seven digits."""
  if isinstance(value, list):
    return [plain(v, digits) for v in value]
  return float(f"{value:.{digits}g}") if math.isfinite(value) else None
