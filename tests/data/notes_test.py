import pytest

from moe_jax.data.notes import tell

pytestmark = pytest.mark.unit


def test_a_note_is_one_line_on_standard_error(capfd):
  # Catches a sentence that is broken into lines, or that is printed on standard output, which
  # programs may read.
  tell("one\n  sentence")
  assert capfd.readouterr() == ("", "note: one sentence\n")
