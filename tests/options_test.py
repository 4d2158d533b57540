"""Tests how options are declared, checked and read."""

import dataclasses
from typing import Annotated, Literal

import pytest

from moe_jax.errors import ConfigError
from moe_jax.options import Bounds, Entries, Flag, OneOf, Options, Text, arguments, keys, option

pytestmark = pytest.mark.unit


@dataclasses.dataclass(frozen=True)
class Example(Options):
  share: Annotated[float, Bounds(0, 1, "a share", below=True)] = option(0.5, "A share.")
  count: Annotated[int, Bounds(1, 10, "few")] = option(2, "A count.", neutral=1)
  factor: Annotated[float, Bounds(0, 4, "small")] | None = option(None, "A factor.")
  name: Literal["a", "b"] = option("a", "A name.")
  flag: bool = option(True, "A flag.")
  text: str = option("", "A text.")
  weights: Annotated[tuple[float, ...], Bounds(0, 1, "shares")] = option((), "Shares.")
  words: tuple[str, ...] = option(("x",), "Words.")


def test_rules_follow_from_annotations():
  # Catches an annotation whose bounds or choices are lost, and a float that must be whole.
  rules = {name: key.rule for name, key in keys(Example).items()}
  assert rules == {
    "share": Bounds(0, 1, "a share", below=True),
    "count": Bounds(1, 10, "few", whole=True),
    "factor": Bounds(0, 4, "small"),
    "name": OneOf(("a", "b")),
    "flag": Flag(),
    "text": Text(),
    "weights": Entries(Bounds(0, 1, "shares")),
    "words": Entries(Text()),
  }
  assert [name for name, key in keys(Example).items() if key.optional] == ["factor"]
  assert [(name, key.neutral) for name, key in keys(Example).items() if key.preset] == [
    ("count", 1)
  ]


@pytest.mark.parametrize(
  "name, value, words",
  [
    ("share", 1, "below 1"),
    ("share", float("nan"), "must be a number"),
    ("count", 2.0, "must be a whole number, at least 1 and at most 10"),
    ("count", True, "whole number"),
    ("count", None, "whole number"),
    ("factor", "1", "at most 4, or None"),
    ("name", "c", "known: a, b"),
    ("flag", 1, "must be True or False"),
    ("text", b"a", "must be a string"),
    ("text", "a\0", "NUL"),
    ("text", "\udc80", "UTF-8"),
    ("weights", 0.5, "must be a tuple"),
    ("weights", (0.5, 2.0), "2.0 in it must be a number"),
    ("words", "x", "must be a tuple"),
    ("words", (1,), "1 in it must be a string"),
  ],
)
def test_what_is_refused(name, value, words):
  # Catches a rule that accepts a wrong type or a number out of bounds.
  with pytest.raises(ConfigError, match="example\\." + name) as error:
    keys(Example)[name].check(f"example.{name}", value)
  assert words in str(error.value)


def test_of_reads_a_section():
  # Catches lists that stay lists and so have no hash, integers that do not become floats, and a
  # failure for keys of other sections.
  section = {"share": 0, "count": 3, "factor": 2, "name": "b", "flag": False, "text": "t"}
  section |= {"weights": [1, 0], "words": ["y"], "another": 5}
  options = Example.of(section)
  assert options == Example(0.0, 3, 2.0, "b", False, "t", (1.0, 0.0), ("y",))
  assert [type(value) for value in (options.share, options.factor, *options.weights)] == [float] * 4
  assert Example.of(section | {"factor": None}).factor is None and hash(options)


def test_arguments_of_a_function():
  # Catches positional arguments that are taken for options, bounds of an annotation that are lost,
  # and a user's function without annotations whose options are not checked.
  def declared(x, *, k: Annotated[int, Bounds(1, 4, "few")] = 2, name: str = "n"):
    return x, k, name

  def bare(x, *, k=2, scale=1.0, name="n", flag=False):
    return x, k, scale, name, flag

  assert {name: key.rule for name, key in arguments(declared).items()} == {
    "k": Bounds(1, 4, "few", whole=True),
    "name": Text(),
  }
  assert list(arguments(bare)) == ["k", "scale", "name", "flag"]
  arguments(bare)["k"].check("k", 7)
  for name, wrong in (("k", 1.5), ("scale", float("inf")), ("name", 1), ("flag", 0)):
    with pytest.raises(ConfigError):
      arguments(bare)[name].check(name, wrong)
