"""Tests the messages of errors, and the functions that check flags and names."""

import pytest

from moe_jax.errors import ConfigError, choose, whole

pytestmark = pytest.mark.unit


def test_the_sentence_names_field_value_and_remedy():
  # Catches a message that leaves out one of the three, or shows a string without its quotes.
  error = ConfigError("model.moe.router.name", "swich", "known: top_k, expert_choice")
  assert str(error) == "model.moe.router.name='swich': known: top_k, expert_choice"
  assert (error.field, error.value) == ("model.moe.router.name", "swich")


def test_it_is_a_value_error():
  # Catches a change that stops callers, who expect ValueErrors for bad arguments, from catching it.
  with pytest.raises(ValueError, match="train.steps=0"):
    raise ConfigError("train.steps", 0, "must be at least 1")


@pytest.mark.parametrize("text", ["", None, "0", "1.0", "-1", "\u00b2", "9" * 5000, "11", " 1"])
def test_whole_numbers_of_flags(text):
  # Catches a ValueError of int() for text that str.isdigit accepts, and a missing upper bound.
  assert whole("n", "10", 1, 10) == 10
  with pytest.raises(ConfigError, match="at least 1 and at most 10"):
    whole("n", text, 1, 10)


def test_any_value_can_be_shown():
  # Catches an error message whose construction raises, or that fills the screen.
  class Odd:
    def __repr__(self):
      raise KeyError("odd")

  for value in (10**5000, -(10**5000), "x" * 10**6, Odd(), (10**5000,), "a\nb", ["a"] * 10**5):
    text = str(ConfigError("f", value, "must be 2"))
    assert "\n" not in text and len(text) < 400 and text.endswith(": must be 2")


def test_the_nearest_name_is_proposed():
  # Catches an error that does not say what would be right, and one that shows only a part of what
  # the user wrote.
  table = {"text": 1, "embedded": 2}
  with pytest.raises(
    ConfigError, match=r"^f='emb:x': did you mean 'embedded'\? known: text, embedded$"
  ):
    choose("f", "embeded", table, shown="emb:x")
  with pytest.raises(ConfigError, match="^f='zzz': known: text, embedded$"):
    choose("f", "zzz", table)
  assert choose("f", "text", table) == 1
  assert choose("f", "text", tuple(table)) == "text"
