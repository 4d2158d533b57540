"""Which rule balances experts best, on the same logits and in the same model? See README.md."""

from __future__ import annotations

from experiments.balance_lab import study, table
from experiments.common.study import Scale, Study, lazy_verb


def baseline(scale: str, row: str) -> str:
  """Returns the row without balancing, with which all others are compared."""
  return "" if row == study.NONE else study.NONE


STUDY = Study(
  name="balance_lab",
  about="Which rule balances the experts best, on the same logits and in the same model?",
  scales={"desk": Scale("32 experts, 0.6M tokens, on CPU cores", table.RESULTS, (table.README,))},
  rows=lambda scale: study.rows(),
  table=lambda scale: table.tables(),
  figures=lambda scale: table.draw(),
  baseline=baseline,
  verbs={
    "simulate": lazy_verb(
      "runs all methods on the same drifting logits, without a model",
      "experiments.balance_lab.drift",
    )
  },
)
