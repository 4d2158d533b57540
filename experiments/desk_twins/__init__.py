"""Each family's desk model and its dense twin; README.md has the question and the outcome."""

import pathlib

from experiments.common import journal
from experiments.common.study import Scale, Study
from experiments.desk_twins import table

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "results.jsonl"


def draw() -> None:
  """Writes the figure of the finished pairs."""
  (HERE / "differences.svg").write_text(table.figure(journal.load(RESULTS)))


STUDY = Study(
  name="desk_twins",
  about="Do the papers' routings pay at a desk, against a dense twin of equal activated FLOPs?",
  scales={"desk": Scale("about 1.6M tokens a run on CPU cores", RESULTS, (HERE / "README.md",))},
  rows=lambda scale: table.ROWS,
  table=lambda scale: {"desk_twins": table.table(journal.load(RESULTS))},
  figures=lambda scale: draw(),
  baseline=table.baseline,
  findings=lambda: table.findings(journal.load(RESULTS)),
)
