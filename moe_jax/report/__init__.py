"""Builds the run report, a self-contained HTML file, from the files in a workdir.

The page loads nothing else: its style sheet, script and charts are all written inline.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from moe_jax.errors import ConfigError
from moe_jax.report.records import read_workdir
from moe_jax.report.sections import page


def write_report(workdir: str | os.PathLike) -> Path:
  """Writes `report.html` into the workdir atomically and returns its path.

  Sections without data are left out of the report. That is the case if the run stopped early, if
  the model is dense, or if there is no routing.json.

  Args:
    workdir: The `--workdir` of a training run, finished or not.

  Returns:
    The path of the written file.

  Raises:
    ConfigError: If the folder holds no config, no metrics and no results.
  """
  run = read_workdir(workdir)
  if not (run.config or run.train or run.eval or run.results):
    raise ConfigError(
      "workdir",
      str(workdir),
      "holds no config.json, metrics.jsonl or results.json; name the --workdir of a training run",
    )
  path = run.path / "report.html"
  # The temporary file is in the same folder, so that `os.replace` is an atomic rename.
  handle, scratch = tempfile.mkstemp(prefix=".report.html.", suffix=".tmp", dir=run.path)
  try:
    with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
      file.write(page(run))
    # mkstemp makes files that only their owner may read.
    os.chmod(scratch, 0o644)
    os.replace(scratch, path)
  except BaseException:
    Path(scratch).unlink(missing_ok=True)
    raise
  return path
