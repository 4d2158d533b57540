"""Every key of a config: which option classes make up which section, and the checks of all values.

An option is declared in one of these classes, beside the code that uses it, and nowhere else.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from ml_collections import ConfigDict, FrozenConfigDict, config_dict

from moe_jax.assembly.bind import check_options
from moe_jax.data.dynamic import DynamicOptions
from moe_jax.data.options import DataOptions
from moe_jax.dispatch import DISPATCHERS, CapacityOptions
from moe_jax.errors import ConfigError
from moe_jax.layers import (
  AttentionOptions,
  GateOptions,
  GroupOptions,
  LatentOptions,
  LossOptions,
  RopeOptions,
  ZeroOptions,
)
from moe_jax.models.options import ExpertOptions, ModelOptions
from moe_jax.options import (
  NOT_NEGATIVE,
  SEED,
  Bounds,
  Config,
  Key,
  Options,
  arguments,
  keys,
  option,
)
from moe_jax.routing import ROUTERS, Router
from moe_jax.routing.balancing import BalancingOptions
from moe_jax.sharding import MeshOptions, ShardingOptions
from moe_jax.training.distill import TeacherOptions
from moe_jax.training.guard import GuardOptions
from moe_jax.training.optimizers import OptimizerOptions
from moe_jax.training.options import TrainOptions


@dataclasses.dataclass(frozen=True)
class RunOptions(Options):
  """The keys that belong to no section."""

  seed: Annotated[int, SEED] = option(
    0, "Seed of initialisation, dropout and routing noise; the order of the data has data.seed."
  )


@dataclasses.dataclass(frozen=True)
class PaperOptions(Options):
  """The section `paper`: what the paper claims of this model, shown by `moe_jax.describe`."""

  name: str = option("", "Name of the paper's model.")
  arxiv: str = option("", "Number of the paper at arXiv, to which the report links.")
  parameters: Annotated[float, NOT_NEGATIVE] = option(0.0, "All parameters; 0 = it says nothing.")
  activated: Annotated[float, NOT_NEGATIVE] = option(0.0, "Parameters that a token activates.")
  without_embedding: Annotated[float, NOT_NEGATIVE] = option(
    0.0, "Parameters without embedding and softmax."
  )
  operations: Annotated[float, NOT_NEGATIVE] = option(
    0.0, "Multiply-adds a time step, without embedding and softmax."
  )
  note: str = option("", "Why a count differs from the claim.")


@dataclasses.dataclass(frozen=True)
class ReportOptions(Options):
  """The section `report`."""

  compare: str = option("", "The results.json of another run, which is shown beside this one's.")
  ladder_megabytes: Annotated[
    float, Bounds(0, 10**6, "LZMA and the n-grams hold the text in memory")
  ] = option(
    32.0,
    "Sources with more training text get no ladder of n-gram models and LZMA, which would take "
    "minutes; 0 = none gets one.",
  )


# Dotted name of each section -> the classes whose fields are its keys, in the order of the config.
SECTIONS: Mapping[str, tuple[type[Options], ...]] = {
  "": (RunOptions,),
  "model": (ModelOptions, AttentionOptions),
  "model.latent": (LatentOptions,),
  "model.rope": (RopeOptions,),
  "model.moe": (
    ExpertOptions,
    ZeroOptions,
    GateOptions,
    GroupOptions,
    CapacityOptions,
    LossOptions,
  ),
  "model.moe.balancing": (BalancingOptions,),
  "data": (DataOptions,),
  "data.dynamic": (DynamicOptions,),
  "optimizer": (OptimizerOptions,),
  "train": (TrainOptions,),
  "train.guard": (GuardOptions,),
  "train.teacher": (TeacherOptions,),
  "mesh": (MeshOptions,),
  "sharding": (ShardingOptions,),
  "paper": (PaperOptions,),
  "report": (ReportOptions,),
}
# Dotted key -> its declaration.
KEYS: Mapping[str, Key] = {
  f"{section}.{name}".lstrip("."): key
  for section, classes in SECTIONS.items()
  for each in classes
  for name, key in keys(each).items()
}
# Sections that hold a name and, for each name that is possible, the options of the function.
FUNCTIONS: Mapping[str, dict[str, Callable[..., Any]]] = {
  "model.moe.router": {name: router.route for name, router in ROUTERS.items()},
  "model.moe.dispatcher": dict(DISPATCHERS),
}
_ROUTERS_OF_THE_PACKAGE = frozenset(ROUTERS)
_FIRST_NAMES = {"model.moe.router": "top_k", "model.moe.dispatcher": "grouped"}
# What a routing preset writes where its paper says nothing: key of model.moe -> value.
NEUTRAL: Mapping[str, Any] = {
  f"{prefix}{name}": key.neutral
  for section, prefix in (("model.moe", ""), ("model.moe.balancing", "balancing."))
  for each in SECTIONS[section]
  for name, key in keys(each).items()
  if key.preset
}


def name_of(router: Router) -> str:
  """Returns the name under which a router of a user's own is known, which is its function's."""
  return getattr(inspect.unwrap(router.route), "__name__", type(router.route).__name__)


def register_router(name: str, router: Router) -> None:
  """Makes a router of a user's own known under a name, beside those of the package.

  Configs that are made afterwards have a section with its options.

  Raises:
    ConfigError: A router of the package has this name.
  """
  if name in _ROUTERS_OF_THE_PACKAGE:
    raise ConfigError("router", name, "is a router of moe_jax; give yours another name")
  ROUTERS[name] = router
  FUNCTIONS["model.moe.router"][name] = router.route


def default_config() -> ConfigDict:
  """Returns a config in which every key has its default."""
  config = ConfigDict()
  for dotted, key in KEYS.items():
    _section(config, dotted.rpartition(".")[0])[key.name] = _default(key)
  for dotted, functions in FUNCTIONS.items():
    section = _section(config, dotted)
    section.name = _FIRST_NAMES[dotted]
    for name, function in functions.items():
      section[name] = {option: _default(key) for option, key in arguments(function).items()}
  return config


def _default(key: Key) -> Any:
  """Returns the default of a key. None has no type; the placeholder lets a float take its place."""
  return config_dict.placeholder(float) if key.optional else key.default


def optional_keys() -> set[str]:
  """Returns the dotted keys whose value may be None, options of functions included."""
  return {dotted for dotted, key in KEYS.items() if key.optional} | {
    f"{section}.{name}.{option}"
    for section, functions in FUNCTIONS.items()
    for name, function in functions.items()
    for option, key in arguments(function).items()
    if key.optional
  }


def _section(config: Config, dotted: str) -> Config:
  """Returns the section of this name, which is made if it is not there."""
  for name in filter(None, dotted.split(".")):
    if name not in config:
      config[name] = ConfigDict()
    config = config[name]
  return config


def find_key(dotted: str) -> Key | None:
  """Returns the declaration of a key, or None if there is no such key.

  Options of routers and dispatchers, such as "model.moe.router.top_k.k", are keys, too.
  """
  if dotted in KEYS:
    return KEYS[dotted]
  branch, _, name = dotted.rpartition(".")
  section, _, function = branch.rpartition(".")
  functions = FUNCTIONS.get(section, {})
  return arguments(functions[function]).get(name) if function in functions else None


def check_config(config: Any) -> None:
  """Raises ConfigError if a config has other keys than the options, or a value that is not allowed.

  What must fit together is not looked at; that is the business of `validate`.
  """
  if not _is_branch(config):
    raise ConfigError("config", config, "must be a ConfigDict, as configs/base.py makes it")
  values = dict(_leaves(config))
  branches = _branches()
  for key, value in values.items():
    if key in branches:
      inside = f"set one of them, such as {branches[key]}"
      raise ConfigError(key, value, f"holds other keys and is no value itself; {inside}")
    if (parent := key.rpartition(".")[0]) in KEYS:
      raise ConfigError(key, value, f"{parent} holds no other keys; leave it out")
    if key not in KEYS and not is_option(key):
      near = difflib.get_close_matches(key, KEYS, 1, cutoff=0.8)
      hint = f"did you mean {near[0]}?" if near else "leave it out"
      raise ConfigError(key, value, f"there is no such key; {hint}")
  for dotted, key in KEYS.items():
    if dotted not in values:
      raise ConfigError(
        dotted, None, "is missing; begin a config with `c = base.get_config()` of configs/base.py"
      )
    key.check(dotted, values[dotted])
  for section, functions in FUNCTIONS.items():
    if f"{section}.name" not in values:
      raise ConfigError(f"{section}.name", None, "is missing; see configs/base.py")
    check_options(functions, _section(config, section), section)


def is_option(dotted: str) -> bool:
  """Returns whether a key names a router or dispatcher, or an option of one."""
  return dotted.startswith(tuple(f"{section}." for section in FUNCTIONS))


def _is_branch(value: Any) -> bool:
  return isinstance(value, (Mapping, ConfigDict, FrozenConfigDict))


def _leaves(config: Any, prefix: str = ""):
  """Yields `(dotted key, value)` of all that is no branch, and of branches that are empty.

  A router without options has an empty branch, which is not yielded.
  """
  for name in config:
    value = config[name]
    if _is_branch(value) and len(value):
      yield from _leaves(value, f"{prefix}{name}.")
    elif not (_is_branch(value) and is_option(f"{prefix}{name}")):
      yield f"{prefix}{name}", value


@functools.cache
def _branches() -> dict[str, str]:
  """Returns a key inside each section, by the section's dotted name."""
  first = {section: f"{section}.name" for section in FUNCTIONS}
  for key in KEYS:
    parts = key.split(".")
    for n in range(1, len(parts)):
      first.setdefault(".".join(parts[:n]), key)
  return first
