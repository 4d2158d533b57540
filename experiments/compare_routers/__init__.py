"""Twelve routers in one backbone; README.md has the question and the outcome."""

from __future__ import annotations

from experiments.common.study import Scale, Study
from experiments.compare_routers import study, table

STUDY = Study(
  name="compare_routers",
  about="Which router is best at the same backbone, data order, seeds and activated FLOPs?",
  scales={
    scale: Scale(about, folder / table.RESULTS, (folder / "README.md",))
    for (scale, folder), about in zip(
      table.FOLDERS.items(),
      ("four layers of width 64, 0.8M tokens, on CPU cores", "110M activated parameters, one GPU"),
      strict=True,
    )
  },
  rows=study.rows,
  table=table.tables,
  figures=table.write_files,
  baseline=lambda scale, row: "" if row == study.DENSE else study.DENSE,
  paired=True,
)
