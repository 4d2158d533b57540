"""Options that are declared once: default, type, bounds, choices and documentation in one place.

A section of a config is one or several frozen dataclasses whose fields are made by `option`:

    @dataclasses.dataclass(frozen=True)
    class GateOptions(Options):
      jitter: Annotated[float, Bounds(0, 1, "a probability", below=True)] = option(0.0, "...")
      jitter_on: Literal["input", "logits"] = option("input", "...")

The default config, the checks of its values, `--help` and docs/options.md are all derived from such
classes (`moe_jax/assembly/sections.py`); the code that uses an option takes the dataclass. The
options of routers and dispatchers are keyword-only arguments, annotated in the same way.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias, TypeVar

from moe_jax.errors import ConfigError, choose

# A ConfigDict or a section of one. `moe_jax/assembly/sections.py` has checked the types of its
# values, which a static type could not describe.
Config: TypeAlias = Any

# Float32 ends at 3.4e38. A larger number than this leaves no room for a product with anything.
LARGEST = 1e20
# The least of what must be positive; float32's smallest normal number is 1.2e-38.
SMALLEST = 1e-30
INT32 = 2**31 - 1  # Optax and the positions of the data are counted in int32.


@dataclasses.dataclass(frozen=True)
class Bounds:
  """A number within bounds; NaN and infinities never are.

  Attributes:
    low: The least value that is allowed.
    high: The largest value that is allowed; with `below`, the least that is too large.
    why: The reason for a bound that is not obvious from the key's meaning.
    whole: Whether the number must be an int. Otherwise it may be an int or a float.
    below: Whether `high` itself is excluded.
  """

  low: int | float
  high: int | float
  why: str
  whole: bool = False
  below: bool = False

  @property
  def words(self) -> str:
    """For example "must be a whole number, at least 1 and at most 1,000"."""

    def show(bound: int | float) -> str:
      return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"

    least = (
      f"above 0 ({SMALLEST:g} or more)" if self.low == SMALLEST else f"at least {show(self.low)}"
    )
    most = f"{'below' if self.below else 'at most'} {show(self.high)}"
    return f"must be a {'whole ' * self.whole}number, {least} and {most}"

  def hold(self, value: Any) -> bool:
    """Returns whether `value` is a number within these bounds. A bool is no number."""
    if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
      return False
    return self.low <= value <= self.high and not (self.below and value == self.high)

  def check(self, key: str, value: Any) -> None:
    """Raises ConfigError unless the bounds hold."""
    if not self.hold(value):
      raise ConfigError(key, value, self.words)
    # JAX would take such an int for an int32, in which it does not fit.
    if not self.whole and isinstance(value, int) and abs(value) > INT32:
      raise ConfigError(key, value, f"must be written with a point, as {float(value)!r}")


@dataclasses.dataclass(frozen=True)
class Flag:
  """True or False."""

  @property
  def words(self) -> str:
    """The rule in words."""
    return "must be True or False"

  def check(self, key: str, value: Any) -> None:
    """Raises ConfigError unless the value is a bool."""
    if not isinstance(value, bool):
      raise ConfigError(key, value, self.words)


@dataclasses.dataclass(frozen=True)
class Text:
  """A string that can be a name or a path.

  Attributes:
    words: The rule in words.
  """

  words: str = "must be a string"

  def check(self, key: str, value: Any) -> None:
    """Raises ConfigError unless the value is a string of valid Unicode without NUL."""
    _check_text(key, value, value, self.words)


@dataclasses.dataclass(frozen=True)
class OneOf:
  """One of some names.

  Attributes:
    names: The valid names, or a mapping from them.
  """

  names: Collection[str]

  @property
  def words(self) -> str:
    """The rule in words."""
    return "must be one of " + ", ".join(repr(name) for name in self.names)

  def check(self, key: str, value: Any) -> None:
    """Raises ConfigError, which proposes the nearest name, unless the value is one of the names."""
    _check_text(key, value, value, "must be a string")
    choose(key, value, self.names)


@dataclasses.dataclass(frozen=True)
class Entries:
  """A tuple (or list) whose entries all follow one rule.

  Attributes:
    entry: The rule of each entry.
  """

  entry: Text | Bounds

  @property
  def words(self) -> str:
    """The rule in words."""
    return "must be a tuple, such as ('a',), or () for none; of each entry: " + self.entry.words

  def check(self, key: str, value: Any) -> None:
    """Raises ConfigError unless the value is a tuple or list, and the rule holds of each entry."""
    if not isinstance(value, (tuple, list)):
      raise ConfigError(key, value, self.words)
    for entry in value:
      if isinstance(self.entry, Text):
        _check_text(key, value, entry, f"{entry!r} in it {self.entry.words}")
      elif not self.entry.hold(entry):
        raise ConfigError(key, value, f"{entry!r} in it {self.entry.words}")


Rule = Bounds | Flag | Text | OneOf | Entries


def _check_text(key: str, whole: Any, text: Any, words: str) -> None:
  """Raises ConfigError about `whole` unless `text`, which is it or a part of it, is valid text."""
  if not isinstance(text, str):
    raise ConfigError(key, whole, words)
  if "\0" in text:
    raise ConfigError(
      key, whole, "holds a NUL character, which no name and no path can hold; leave it out"
    )
  try:
    text.encode()
  except UnicodeEncodeError:
    raise ConfigError(
      key, whole, "holds bytes that are no UTF-8 text; use a name or a path that is"
    ) from None


# Rules that several sections share.
POSITIVE = Bounds(SMALLEST, LARGEST, "see LARGEST and SMALLEST")
NOT_NEGATIVE = Bounds(0, LARGEST, "see LARGEST")
PROBABILITY = Bounds(0, 1, "a probability, a share or a decay rate", below=True)
SEED = Bounds(
  0,
  2**32 - 1,
  "a key of JAX's generator is made of 32 bits: others would be the same seed under another name",
  whole=True,
)
WIDTH = Bounds(
  1,
  2**20,
  "64 times the widest published (Switch-XXL's d_ff is 65,536); a square matrix of it takes 4 TB",
  whole=True,
)
OPTIONAL_WIDTH = dataclasses.replace(WIDTH, low=0)
EXPERTS = Bounds(0, 2**20, "the most published is 1,048,576 (PEER, arXiv 2407.04153)", whole=True)
COUNT_OF_EXPERTS = dataclasses.replace(EXPERTS, low=1)
ROWS = Bounds(1, 2**20, "a million tokens a row, a million rows a batch", whole=True)
STEPS = Bounds(1, INT32, "Optax counts steps in int32", whole=True)
OPTIONAL_STEPS = dataclasses.replace(STEPS, low=0)
CAPACITY = Bounds(SMALLEST, 2**20, "from E on every expert has a slot for every token")
# Rules of options whose annotation gives no bounds, such as those of a router of one's own.
_ANY_INT = Bounds(-INT32 - 1, INT32, "whole numbers are int32", whole=True)
_ANY_FLOAT = Bounds(-LARGEST, LARGEST, "see LARGEST")

_ABSENT: Any = object()
_Section = TypeVar("_Section", bound="Options")


@dataclasses.dataclass(frozen=True)
class Options:
  """Base class of a config's section, or of a part of one."""

  @classmethod
  def of(cls: type[_Section], values: Any) -> _Section:
    """Returns the options that a section of a config holds.

    Args:
      values: A mapping that has all of their names, and perhaps others.
    """
    return cls(**{name: _typed(key, values[name]) for name, key in keys(cls).items()})


def option(default: Any, doc: str, *, neutral: Any = _ABSENT) -> Any:
  """Returns the dataclass field of an option.

  Args:
    default: The value in configs/base.py.
    doc: What the option does, with its unit, and what its special values mean; a sentence or two.
    neutral: The value that a routing preset gives to an option that its paper does not mention. An
      option without one is not touched by presets.
  """
  return dataclasses.field(default=default, metadata={"doc": doc, "neutral": neutral})


@dataclasses.dataclass(frozen=True)
class Key:
  """An option of a config, as its declaration describes it.

  Attributes:
    name: The last part of the dotted key.
    default: The value in configs/base.py.
    doc: What the option does.
    rule: Which values it may have.
    optional: Whether None is a value, too.
    neutral: See `option`; only meaningful if `preset` is True.
    preset: Whether routing presets set this option.
  """

  name: str
  default: Any
  doc: str
  rule: Rule
  optional: bool = False
  neutral: Any = None
  preset: bool = False

  @property
  def words(self) -> str:
    """The rule in words, with None where that is a value."""
    return self.rule.words + (", or None" if self.optional else "")

  def check(self, key: str, value: Any) -> None:
    """Raises ConfigError if the value is not allowed; `key` is the whole dotted key."""
    if value is None and self.optional:
      return
    try:
      self.rule.check(key, value)
    except ConfigError as error:
      if self.optional and error.remedy == self.rule.words:
        raise ConfigError(key, value, self.words) from None
      raise


@functools.cache
def keys(section: type) -> Mapping[str, Key]:
  """Returns the options that a dataclass declares, by name and in their order."""
  hints = typing.get_type_hints(section, include_extras=True)
  described = {}
  for field in dataclasses.fields(section):
    rule, optional = _rule(hints[field.name], field.default)
    neutral = field.metadata["neutral"]
    described[field.name] = Key(
      field.name,
      field.default,
      field.metadata["doc"],
      rule,
      optional,
      neutral,
      preset=neutral is not _ABSENT,
    )
  return described


@functools.cache
def arguments(function: Callable[..., Any]) -> Mapping[str, Key]:
  """Returns the options of a function, which are its keyword-only arguments, by name."""
  parameters = [
    parameter
    for parameter in inspect.signature(function).parameters.values()
    if parameter.kind is parameter.KEYWORD_ONLY
  ]
  if not parameters:
    return {}
  try:
    hints = typing.get_type_hints(inspect.unwrap(function), include_extras=True)
  except NameError:  # A router of a user's own may have annotations that name nothing.
    hints = {}
  described = {}
  for parameter in parameters:
    hint = hints.get(parameter.name, type(parameter.default))
    rule, optional = _rule(hint, parameter.default)
    described[parameter.name] = Key(parameter.name, parameter.default, "", rule, optional)
  return described


def _rule(hint: Any, default: Any) -> tuple[Rule, bool]:
  """Returns the rule that an annotation states, and whether None is a value, too."""
  if typing.get_origin(hint) in (typing.Union, types.UnionType):
    parts = [part for part in typing.get_args(hint) if part is not types.NoneType]
    if len(parts) == 1:
      return _rule(parts[0], default)[0], True
  if typing.get_origin(hint) is typing.Annotated:
    kind, *extras = typing.get_args(hint)
    rule = next((extra for extra in extras if isinstance(extra, (Bounds, OneOf, Text))), None)
    if typing.get_origin(kind) is tuple:
      return Entries(rule if isinstance(rule, (Text, Bounds)) else Text()), False
    if isinstance(rule, Bounds):
      return dataclasses.replace(rule, whole=kind is int), False
    return (rule, False) if rule else _rule(kind, default)
  if typing.get_origin(hint) is typing.Literal:
    return OneOf(typing.get_args(hint)), False
  if typing.get_origin(hint) is tuple:
    return Entries(Text()), False
  # `type(default)` serves annotations that only name a type, and those that name none.
  kind = hint if hint in (bool, int, float, str) else type(default)
  rules: Mapping[type, Rule] = {bool: Flag(), int: _ANY_INT, float: _ANY_FLOAT, str: Text()}
  return rules.get(kind, Text()), default is None


def _typed(key: Key, value: Any) -> Any:
  """Returns the value of a config as an option's field holds it.

  Lists become tuples, because options have a hash, and whole numbers become floats where a float is
  meant.
  """
  rule = key.rule.entry if isinstance(key.rule, Entries) else key.rule
  is_float = isinstance(rule, Bounds) and not rule.whole
  if isinstance(key.rule, Entries):
    return tuple(float(entry) if is_float else entry for entry in value)
  return float(value) if is_float and value is not None else value
