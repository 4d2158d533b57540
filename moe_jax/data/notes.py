"""What a user should know although nothing is wrong enough to stop."""

from __future__ import annotations

import sys


def tell(sentence: str) -> None:
  """Prints one line on standard error; a run silences the logs of libraries, and this must be
  seen."""
  print("note:", " ".join(sentence.split()), file=sys.stderr, flush=True)
