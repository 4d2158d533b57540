"""Where numbers go: `metrics.jsonl` (the record, one JSON object a line) and TensorBoard (a view of it)."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import numpy as np

from moe_jax.training import workdir


class MetricsWriter:
  """Appends to a run's metrics; everything after `step` is forgotten first, so a resumed run repeats no line.

  Args:
    directory: the workdir.
    step: the run goes on from here.
    active: False on all processes but the first: nothing is written.
  """

  def __init__(self, directory: pathlib.Path, step: int, active: bool = True):
    self._file = self._board = None
    if not active:
      return
    import tensorboardX
    path = directory / "metrics.jsonl"
    workdir.write_atomically(path, "".join(json.dumps(line) + "\n" for line in read(path) if line["step"] <= step))
    self._file = path.open("a", buffering=1)
    self._board = tensorboardX.SummaryWriter(str(directory / "tb"), purge_step=step + 1, flush_secs=10)

  def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
    """One line: `{"step", "kind"} | values`. Scalars also go to TensorBoard, as do arrays, one curve an entry."""
    if self._file is None:
      return
    values = {name: np.asarray(value, np.float64) for name, value in values.items()}
    line = {"step": step, "kind": kind} | {name: plain(value.tolist()) for name, value in values.items()}
    self._file.write(json.dumps(line) + "\n")
    for name, value in values.items():
      for index in np.ndindex(value.shape):
        tag = "/".join([kind, name, *map(str, index)])
        self._board.add_scalar(tag, value[index], step)

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
      self._board.close()


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of a `metrics.jsonl`, without a last one that a kill cut short; [] if there is no file."""
  lines = []
  for text in path.read_text().splitlines() if path.exists() else []:
    try:
      line = json.loads(text)
    except json.JSONDecodeError:
      break
    if not isinstance(line, dict) or "step" not in line:
      break
    lines.append(line)
  return lines


def plain(value, digits: int = 7):
  """Numbers, in lists or not, as JSON can say them: None stands for what is not finite. float32 holds seven digits."""
  if isinstance(value, list):
    return [plain(v, digits) for v in value]
  return float(f"{value:.{digits}g}") if math.isfinite(value) else None
