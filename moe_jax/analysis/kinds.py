"""The kinds of tokens, by their text alone."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

KINDS = (
  "special",
  "sentinel",
  "white space",
  "lower-case",
  "capitalised",
  "number",
  "punctuation",
  "code",
  "non-ASCII",
  "other",
)
# Marks that code has and prose hardly has. Parentheses and quotes are punctuation, as in prose.
_CODE_MARKS = frozenset("#$%&*+/<=>@[\\]^_`{|}~")
# A name with digits, underscores or inner capitals, such as x1, _load or readLine.
_NAME = re.compile(r"(?=.*[A-Za-z])(?:\w*[\d_]\w*|\w*[a-z]\w*[A-Z]\w*)", re.ASCII)
_NUMBER = re.compile(r"\d[\d.,]*", re.ASCII)


def kind(piece: str | None) -> str:
  """Returns the kind of a token, one of `KINDS` except "sentinel".

  Args:
    piece: The text of the token, or None for a special token. "" stands for a part of a character.
      White space around other text does not count, because subword tokens begin with it.
  """
  if piece is None:
    return "special"
  text = piece.strip()
  if not text:
    return "white space" if piece else "non-ASCII"
  # Scripts without upper and lower case, such as Chinese, have letters that are neither.
  if text.isalpha() and text[0].lower() != text[0].upper():
    if text.isascii() and _NAME.fullmatch(text):
      return "code"
    return "lower-case" if text[0].islower() else "capitalised"
  if not text.isascii():
    return "non-ASCII"
  if _NUMBER.fullmatch(text):
    return "number"
  if any(c.isalnum() for c in text):
    return "code" if _NAME.fullmatch(text) else "other"
  return "code" if _CODE_MARKS & set(text) else "punctuation"


def kinds_of(pieces: Sequence[str | None]) -> Int[np.ndarray, "N"]:
  """Returns the index in `KINDS` of the kind of each of N tokens."""
  index = {piece: KINDS.index(kind(piece)) for piece in set(pieces)}
  return np.array([index[piece] for piece in pieces], int)
