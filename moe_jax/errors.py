"""The exceptions that a command tells in one sentence, and the exit code that each of them has."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

# Exit codes of every command. 1 is left to Python, which ends so after an exception that nobody
# expected.
EXIT_INPUT = 2  # a `ConfigError`
EXIT_DIVERGED = 3  # a `Diverged`
LONGEST = 300  # characters of a value in a message


class Diverged(RuntimeError):
  """Training has left the finite numbers, or keeps leaving them; what was saved before is kept."""


class ConfigError(ValueError):
  """Bad input, told in one sentence that names the field, the value and the remedy.

  Commands print the sentence and exit with code 2; the traceback is shown only with `--debug`.

  Args:
    field: dotted config key, flag or path that is wrong, e.g. "model.moe.router.name".
    value: the offending value (shown with `repr`, of which at most `LONGEST` characters).
    remedy: what is wrong and what would be right, as the rest of the sentence.
  """

  def __init__(self, field: str, value: object, remedy: str):
    self.field, self.value, self.remedy = field, value, remedy
    super().__init__(f"{shorten(field)}={shown(value)}: {remedy}")


def shown(value: object) -> str:
  """`repr(value)` on one line, without its middle where it is longer than `LONGEST` characters;
  never raises."""
  if isinstance(value, int) and value.bit_length() > 4 * LONGEST:
    return (
      f"{'-' * (value < 0)}2**{value.bit_length() - 1}..."  # Python refuses to print some of these
    )
  try:
    text = repr(value)
  except Exception as error:  # of whatever class the value is, or a part of it is such a number
    text = f"<{type(value).__name__} that cannot be shown: {type(error).__name__}>"
  return shorten(text if isinstance(value, str) else " ".join(text.split()))


def shorten(text: str) -> str:
  """Without its middle, if it is longer than `LONGEST` characters."""
  return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}...{text[-LONGEST // 3 :]}"


def whole(field: str, text: str | None, low: int = 1, high: int = 2**20) -> int:
  """The whole number that a flag's text says.

  Raises:
    ConfigError: it says none, or one outside of [low, high].
  """
  # Not str.isdigit, which holds for "²", of which int() makes no number; nor does it of 5,000
  # digits.
  if not text or not text.isdecimal() or len(text) > 18 or not low <= int(text) <= high:
    raise ConfigError(field, text, f"must be a whole number, at least {low:,} and at most {high:,}")
  return int(text)


def choose(field: str, name: Any, table: Collection[str], shown: object = None) -> Any:
  """`table[name]` of a literal table, or `name` itself where the table is only a list of names.

  Args:
    field: dotted config key that holds `name`.
    name: one of `table`.
    table: names, or a mapping from names.
    shown: what the user wrote, where `name` is only a part of it.

  Raises:
    ConfigError: there is no such name; proposes the nearest and lists all.
  """
  if (
    isinstance(name, str) and name in table
  ):  # nothing else is a name, and some values have no hash
    return table[name] if isinstance(table, Mapping) else name
  near = (
    difflib.get_close_matches(shorten(name), table, n=1, cutoff=0.5)
    if isinstance(name, str)
    else []
  )
  hint = f"did you mean {near[0]!r}? " if near else ""
  raise ConfigError(field, name if shown is None else shown, f"{hint}known: {', '.join(table)}")
