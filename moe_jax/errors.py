"""The one exception that means "the user's input is wrong", and how it is shown."""

from __future__ import annotations


class ConfigError(ValueError):
  """Bad input, told in one sentence that names the field, the value and the remedy.

  Commands print the sentence and exit with code 2; the traceback is shown only with `--debug`.

  Args:
    field: dotted config key, flag or path that is wrong, e.g. "model.moe.router.name".
    value: the offending value (shown with `repr`).
    remedy: what is wrong and what would be right, as the rest of the sentence.
  """

  def __init__(self, field: str, value: object, remedy: str):
    self.field, self.value, self.remedy = field, value, remedy
    super().__init__(f"{field}={value!r}: {remedy}")
