"""The two small models on the embedded corpus; README.md has the question and the outcome."""

from experiments.common.study import Scale, Study
from experiments.embedded_corpus import table


def baseline(scale: str, row: str) -> str:
  """Returns the dense twin of a row with experts."""
  return "" if row.startswith("dense_") else f"dense_{row}"


STUDY = Study(
  name="embedded_corpus",
  about="How do the two small models compare with n-grams, LZMA and their dense twins?",
  # The results are one file a row, in the folder of the study.
  scales={"desk": Scale("minutes to an hour a run on CPU cores", table.HERE, (table.README,))},
  rows=lambda scale: table.ROWS,
  table=lambda scale: {name: table.table(name) for name in table.MODELS},
  figures=lambda scale: table.draw(),
  baseline=baseline,
  train=table.train,
  load=table.load_rows,
)
