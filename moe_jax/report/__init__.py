"""The run report: one HTML file, made from the files of a workdir, that needs no other file and no
network."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from moe_jax.errors import ConfigError
from moe_jax.report.records import read_workdir
from moe_jax.report.sections import page


def write_report(workdir: str | os.PathLike) -> Path:
  """Writes `report.html` into the workdir, whole or not at all, and returns its path.

  Whatever is missing (a run stopped early, a dense model, no routing.json) is left out of the
  report.

  Raises:
    ConfigError: the folder holds neither a config nor metrics.
  """
  found = read_workdir(workdir)
  if not (found.config or found.train or found.eval or found.results):
    raise ConfigError(
      "workdir",
      str(workdir),
      "holds no config.json, metrics.jsonl or results.json; name the --workdir of a training run",
    )
  path = found.path / "report.html"
  handle, scratch = tempfile.mkstemp(prefix=".report.html.", suffix=".tmp", dir=found.path)
  try:
    with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
      file.write(page(found))
    os.chmod(scratch, 0o644)
    os.replace(scratch, path)
  except BaseException:
    Path(scratch).unlink(missing_ok=True)
    raise
  return path
