"""Every key has bounds, and a value of any type is either valid or refused in one sentence."""

import functools
import math

import pytest
from changed import config
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from moe_jax import assembly
from moe_jax.assembly.sections import FUNCTIONS, KEYS, find_key, is_option, optional_keys
from moe_jax.errors import ConfigError
from moe_jax.options import Bounds, Entries, arguments

pytestmark = pytest.mark.unit


def flat(c, prefix=""):
  """Returns all dotted keys that are not sections, with their values."""
  found = {}
  for key, value in c.items():
    found |= (
      flat(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else {prefix + key: value}
    )
  return found


def put(changes):
  """Returns the base config with values that ConfigDict itself would convert or refuse."""
  c = config()
  with c.unlocked():
    for key, value in changes.items():
      *parents, name = key.split(".")
      node = functools.reduce(lambda node, parent: node[parent], parents, c)
      del node[name]
      node[name] = value
  return c


def test_the_default_config_has_every_option_and_no_other_key():
  # Catches a section that the config lacks, and a key that no class declares.
  assert {key for key in flat(config()) if not is_option(key)} == set(KEYS)


def test_every_option_is_documented_and_accepts_its_default():
  # Catches an option without a text for `--help`, and a default that its own bounds refuse.
  for dotted, key in KEYS.items():
    assert key.doc.endswith(".") and key.doc[0] == key.doc[0].upper() or key.doc[0] in "0123456789"
    key.check(dotted, key.default)
  for section, functions in FUNCTIONS.items():
    for name, function in functions.items():
      for option, key in arguments(function).items():
        key.check(f"{section}.{name}.{option}", key.default)


def bounds_of(key):
  """Returns the bounds of a key's number, or None if the key does not hold a number."""
  declared = find_key(key)
  return declared.rule if declared and isinstance(declared.rule, Bounds) else None


def test_every_number_has_finite_bounds():
  # Catches an option that may be infinite.
  for key, value in flat(config()).items():
    if isinstance(value, (int, float)) and not isinstance(value, bool):
      bounds = bounds_of(key)
      assert bounds is not None and bounds.why, key
      assert -math.inf < bounds.low < bounds.high < math.inf
  for key in KEYS.values():
    if isinstance(key.rule, Entries) and isinstance(key.rule.entry, Bounds):
      assert key.rule.entry.high < math.inf


def test_none_is_for_keys_whose_default_is_none():
  # Catches a None that would only fail in later arithmetic, and a declaration that does not allow
  # the None of its placeholder.
  optional = optional_keys()
  assert {key for key, value in flat(config()).items() if value is None} == optional
  assert "model.moe.capacity_factor" in optional
  # An option of a dispatcher.
  assert "model.moe.dispatcher.ragged_all_to_all.buffer_factor" in optional


NUMBERS = [key for key in flat(config()) if bounds_of(key)]
BAD = (
  math.inf,
  -math.inf,
  math.nan,
  1e30,
  10**400,
  -(10**400),
  True,
  "1",
  (1,),
  None,
  ConfigDict({"a": 1}),
)


@pytest.mark.parametrize(
  "value",
  BAD,
  ids=[
    "inf",
    "-inf",
    "nan",
    "1e30",
    "10**400",
    "-10**400",
    "True",
    "'1'",
    "(1,)",
    "None",
    "a branch",
  ],
)
def test_no_number_is_infinite_huge_or_of_another_type(value):
  # Catches a bound on only one side, and an int with hundreds of digits that fills the message.
  for key in NUMBERS:
    if not (value is None and find_key(key).optional):
      with pytest.raises(ConfigError) as error:
        find_key(key).check(key, value)
      assert error.value.field.startswith(key) and len(str(error.value)) < 1000


@pytest.mark.parametrize(
  "changes, field, words",
  [
    ({"seed": 2**32}, "seed", "at most 4,294,967,295"),
    ({"seed": -1}, "seed", "at least 0"),
    ({"data.seed": 2**32}, "data.seed", "at most 4,294,967,295"),
    ({"model.moe.router.hash_layer.seed": -1}, "model.moe.router.hash_layer.seed", "at least 0"),
    (
      {"model.moe.router.random_choice.seed": 10**20},
      "model.moe.router.random_choice.seed",
      "4,294,967,295",
    ),
    ({"model.num_layers": 2**31}, "model.num_layers", "at most 1,000"),
    ({"model": 5}, "model", "such as model."),
    ({"model.moe": 5}, "model.moe", "such as"),
    ({"model.moe.router": "switch"}, "model.moe.router", "such as model.moe.router.name"),
    ({"model.moe.router.top_k": 5}, "model.moe.router.top_k", "holds the options of top_k"),
    ({"model.moe.num_exports": 4}, "model.moe.num_exports", "did you mean model.moe.num_experts"),
    ({"mine": 4}, "mine", "there is no such key"),
    ({"mesh.data": 1.0}, "mesh.data", "whole number"),
    ({"data.sources": "embedded:prose"}, "data.sources", "must be a tuple"),
    ({"data.cache_dir": "a\0b"}, "data.cache_dir", "NUL"),
    ({"data.sources": ("text:\0",)}, "data.sources", "NUL"),
    ({"paper.note": "\udc80"}, "paper.note", "UTF-8"),
    ({"model.tied_embeddings": 1}, "model.tied_embeddings", "True"),
    ({"data.weights": (math.inf, 1.0, 1.0)}, "data.weights", "inf in it must be a number"),
    (
      {"model.moe.routed_scale": 2**40},
      "model.moe.routed_scale",
      "must be written with a point, as 1099511627776.0",
    ),
    ({"sharding.embed": "fsdp"}, "sharding.embed", "must be a tuple"),
    ({"seed": ConfigDict({"a": 1})}, "seed.a", "no other keys"),
    (
      {"model.moe.num_experts": 0, "model.moe.router.top_k.priority": []},
      "model.moe.router.top_k.priority",
      "must be a string",
    ),
  ],
)
def test_wrong_keys_and_values(changes, field, words):
  # Catches a missing check of any kind in the table.
  with pytest.raises(ConfigError) as error:
    assembly.validate(
      put(changes) if set(changes) <= {*flat(config()), "model", "model.moe"} else config(changes)
    )
  assert error.value.field == field and words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
  "key",
  [
    "seed",
    "model",
    "model.latent.kv_rank",
    "model.moe.router",
    "model.moe.router.name",
    "data.sources",
    "mesh.data",
    "sharding.embed",
  ],
)
def test_a_missing_key(key):
  # Catches a KeyError or AttributeError in the code that reads the key first.
  c = config()
  *parents, name = key.split(".")
  with c.unlocked():
    del functools.reduce(lambda node, parent: node[parent], parents, c)[name]
  with pytest.raises(ConfigError, match="is missing") as error:
    assembly.validate(c)
  assert error.value.field.startswith(key)


ODD = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(),
  st.integers(-4, 20),
  st.floats(),
  st.floats(0, 2),
  st.text(max_size=8),
  st.sampled_from([10**400, 2**31, 2**32, 2**63, "\n", "\0", "None", "switch", b"x", 1j, object()]),
  st.lists(st.one_of(st.integers(), st.floats(), st.text(max_size=4)), max_size=3).map(tuple),
  st.dictionaries(st.sampled_from(["a", "name", ""]), st.integers(), max_size=2).map(ConfigDict),
)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(sorted(flat(config()))), ODD)
@example("model.moe.group_size", 2**30)
@example("model.d_model", 2**20)
def test_any_value_of_any_type_is_valid_or_told_in_a_sentence(key, value):
  # Catches any other exception of a check or of tracing a router.
  try:
    assembly.validate(put({key: value}))
  except ConfigError as error:
    assert key.rpartition(".")[2] in str(error) or error.field.split(".")[0] == key.split(".")[0]
    assert "\n" not in str(error)


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(flat(config()))), ODD), min_size=2, max_size=4))
def test_several_at_once(changes):
  # Catches a check that relies on a condition that is only checked later.
  try:
    assembly.validate(put(dict(changes)))
  except ConfigError as error:
    assert "\n" not in str(error)
