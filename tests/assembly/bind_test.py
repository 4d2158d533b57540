"""A name and its options in a config become a function with its options bound."""

import pytest

from moe_jax import assembly
from moe_jax.errors import ConfigError

pytestmark = pytest.mark.unit


def test_bind():
  # Catches options of one function that are bound to another, and an int that is refused in place
  # of a float.
  table = {"a": lambda x, *, s=1.0, n=2: (x, s, n), "b": lambda x: x}
  assert assembly.bind(table, {"name": "a", "a": {"s": 3}, "b": {}}, "f")(0) == (0, 3, 2)
  assert assembly.bind(table, {"name": "b", "a": {"s": 3.0}}, "f")(5) == 5
  for options, field in (
    ({"name": "a", "a": {"n": True}}, "f.a.n"),
    ({"name": "a", "b": {"n": 1}}, "f.b.n"),
    ({"name": "a", "c": {}}, "f"),
  ):
    with pytest.raises(ConfigError) as error:
      assembly.bind(table, options, "f")
    assert error.value.field == field
