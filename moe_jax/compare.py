"""Compares runs on one page.

  python -m moe_jax compare RUN RUN ... [--out=FILE.html]

Each RUN is the --workdir of a training run, finished or not, or the folder of a row of a study,
whose numbers are then the means over its seeds. The page overlays their curves and has a table of
their results, as differences to the first run, and a table of the keys of their configs that
differ; it notes where runs do not compare, as with different numbers of steps. It is written to
FILE.html, or to compare.html in the first run's workdir; its path is printed.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

from moe_jax.commands import Flag, guarded, take_flags
from moe_jax.errors import ConfigError
from moe_jax.report.comparison import comparison, names
from moe_jax.report.records import read_workdir


def main(argv: Sequence[str]) -> int:
  """Writes the page, prints its path and returns the exit code."""
  return guarded(argv, __doc__, lambda rest: _compare(rest[1:]))


def _compare(args: Sequence[str]) -> int:
  """Does what the arguments say."""
  flags, paths = take_flags(args, (Flag("out"),), config=False)
  if len(paths) < 2:
    raise ConfigError("RUN", " ".join(paths), "give at least two workdirs: compare RUN RUN ...")
  runs = {}
  for name, path in zip(names(paths), paths, strict=True):
    runs[name] = read_workdir(path)
    if not (runs[name].train or runs[name].eval or runs[name].results):
      raise ConfigError(
        "RUN", path, "holds no metrics.jsonl or results.json; name the --workdir of a training run"
      )
  out = pathlib.Path(flags.get("out") or pathlib.Path(paths[0]) / "compare.html")
  if out.suffix != ".html":
    raise ConfigError("out", str(out), "must end in .html, such as compare.html")
  try:
    out.write_text(comparison(runs), encoding="utf-8")
  except OSError as error:
    raise ConfigError(
      "out", str(out), f"{error.strerror}; give a file that can be written, such as compare.html"
    ) from error
  print(out)
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
