"""The exceptions that commands report in one sentence, and the exit codes of commands."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Collection, Mapping
from typing import Any

# Exit codes of every command. The code 1 is left to Python, which uses it after an unexpected
# exception.
EXIT_INPUT = 2  # after a `ConfigError`
EXIT_DIVERGED = 3  # after a `Diverged`
LONGEST = 300  # maximum number of characters of a value in a message


class Diverged(RuntimeError):
  """Training has diverged: its numbers are no longer finite. What was saved before is kept."""


class ConfigError(ValueError):
  """Bad input, with a message of one sentence that names the field, the value and the remedy.

  Commands print the sentence and exit with code 2. They show the traceback only with `--debug`.

  Args:
    field: The dotted config key, flag or path that is wrong, e.g. "model.moe.router.name".
    value: The wrong value. The message shows at most `LONGEST` characters of its `repr`.
    remedy: What is wrong and what would be right, as the rest of the sentence.
  """

  def __init__(self, field: str, value: object, remedy: str):
    self.field, self.value, self.remedy = field, value, remedy
    super().__init__(f"{shorten(field)}={shown(value)}: {remedy}")


def jax_is_missing() -> bool:
  """Returns whether this Python lacks JAX, and says on standard error how to install it.

  Commands ask before they import what needs JAX, for a user who has not entered the environment.
  """
  if importlib.util.find_spec("jax") is not None:
    return False
  print(
    f"error: {sys.executable} has no JAX, which moe_jax needs; install both in the clone with "
    "`make venv`, and call .venv/bin/python in place of python, or with `pip install -e .` in an "
    "environment of your own",
    file=sys.stderr,
  )
  return True


def shown(value: object) -> str:
  """Returns `repr(value)` on one line, shortened to about `LONGEST` characters; never raises."""
  # Python refuses to convert integers of more than 4300 digits to text.
  if isinstance(value, int) and value.bit_length() > 4 * LONGEST:
    return f"{'-' * (value < 0)}2**{value.bit_length() - 1}..."
  try:
    text = repr(value)
  # The `repr` of a class may raise anything, and a part of the value may be such an integer.
  except Exception as error:
    text = f"<{type(value).__name__} that cannot be shown: {type(error).__name__}>"
  return shorten(text if isinstance(value, str) else " ".join(text.split()))


def shorten(text: str) -> str:
  """Returns `text`, without its middle if it is longer than `LONGEST` characters."""
  return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}...{text[-LONGEST // 3 :]}"


def whole(field: str, text: str | None, low: int = 1, high: int = 2**20) -> int:
  """Parses the value of a flag as a whole number in [low, high].

  Args:
    field: The name of the flag, for the message.
    text: The value. None means that the flag has none.
    low: The smallest number that is allowed.
    high: The largest number that is allowed, below 10**18.

  Raises:
    ConfigError: If the text is not a whole number, or if it is out of range.
  """
  # `str.isdigit` would accept "²", which int() does not parse, and int() also refuses numbers of
  # more than 4300 digits.
  if not text or not text.isdecimal() or len(text) > 18 or not low <= int(text) <= high:
    raise ConfigError(field, text, f"must be a whole number, at least {low:,} and at most {high:,}")
  return int(text)


def choose(field: str, name: Any, table: Collection[str], shown: object = None) -> Any:
  """Looks a name up, and returns `table[name]` or, if the table is no mapping, `name`.

  Args:
    field: The dotted config key that holds `name`.
    name: The name. If it is not a string, it is not in the table.
    table: The known names, or a mapping from them.
    shown: What the user wrote, if `name` is only a part of it. None means `name`.

  Raises:
    ConfigError: If there is no such name. The message proposes the nearest name and lists all.
  """
  # The type is checked first, because values that are not hashable cannot be looked up.
  if isinstance(name, str) and name in table:
    return table[name] if isinstance(table, Mapping) else name
  near = (
    difflib.get_close_matches(shorten(name), table, n=1, cutoff=0.5)
    if isinstance(name, str)
    else []
  )
  hint = f"did you mean {near[0]!r}? " if near else ""
  raise ConfigError(field, name if shown is None else shown, f"{hint}known: {', '.join(table)}")
