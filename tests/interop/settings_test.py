"""Tests the reading of config.json, in which nothing may be overlooked."""

import pytest

from moe_jax.errors import ConfigError
from moe_jax.interop.settings import Settings

pytestmark = pytest.mark.unit


def test_all_problems_are_one_sentence():
  # Catches a setting that is overlooked because nobody asked for it, also inside another, and a
  # message that names only the first problem.
  s = Settings({"model_type": "x", "act": "gelu", "odd": 3, "inner": {"deep": True, "known": 1}})
  assert s.must("act", "silu") == "silu"
  assert s.take("width") == 1
  assert s.section("inner").take("known") == 1
  with pytest.raises(ConfigError) as caught:
    s.done()
  assert str(caught.value) == (
    "config.json='x': cannot be expressed by moe_jax: act='gelu' must be 'silu'; width is missing; "
    "odd=3 is not known here; inner.deep=True is not known here"
  )


def test_what_is_off_or_neutral_is_accepted():
  # Catches a checkpoint that is refused because of a switch that is off, or of what only says how
  # it was made; and null that is taken for a value.
  s = Settings({"odd": False, "other": None, "use_cache": True, "width": None})
  assert s.take("width", 7) == 7
  s.done()
