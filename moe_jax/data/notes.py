"""Notes to the user about things that do not stop the program."""

from __future__ import annotations

import sys


def tell(sentence: str) -> None:
  """Prints a note as one line on standard error.

  It is printed and not logged, because a run silences the logs of libraries.
  """
  print("note:", " ".join(sentence.split()), file=sys.stderr, flush=True)
