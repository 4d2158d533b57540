"""The sublayers of a Brainformer's block, which `config.model.block` describes by text.

The text of a sublayer, such as "moe:gate=top_2,hidden=2048", gives its kind and the options in
which it differs from the rest of the config.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from moe_jax.errors import ConfigError, choose
from moe_jax.experts import ACTIVATIONS
from moe_jax.models import SEARCH_SPACE, find_pattern
from moe_jax.options import Config
from moe_jax.routing import ROUTERS

# For each kind of sublayer, the keys of config.model that its options replace. The options `gate`
# and `capacity` belong to the router; see `read`.
KEYS: Mapping[str, Mapping[str, str]] = {
  "attention": {"width": "d_model", "heads": "num_heads"},
  "ffn": {"width": "d_model", "hidden": "d_ff", "activation": "activation"},
  "moe": {"width": "d_model", "hidden": "moe.d_ff", "activation": "moe.activation"},
}
# The routers of the paper's gates: that of GLaM, with which the paper compares, and Expert Choice.
GATES = {"top_2": "gshard", "expert_choice": "expert_choice"}
_NAMES = {"activation": ACTIVATIONS, "gate": GATES}


def kind(entry: str) -> str:
  """Returns the kind of a sublayer: "attention", "ffn" or "moe"."""
  return choose("model.block", entry.partition(":")[0], tuple(SEARCH_SPACE), shown=entry)


def options(entry: str) -> dict[str, Any]:
  """Returns the options in the text of a sublayer.

  For example, "moe:gate=top_2,hidden=2048" has {"gate": "top_2", "hidden": 2048}.

  Raises:
    ConfigError: If the kind of sublayer or an option is unknown, if an option stands there twice,
      or if a value is invalid.
  """
  search_space, values = SEARCH_SPACE[kind(entry)], {}
  for part in filter(None, entry.partition(":")[2].split(",")):
    name, _, value = part.partition("=")
    example = choose("model.block", name, search_space, shown=entry)[0]
    if name in values:
      raise ConfigError("model.block", entry, f"{name} stands there twice; give it once")
    values[name] = _value(entry, name, value, example)
  return values


def _value(entry: str, name: str, value: str, example: int | float | str) -> int | float | str:
  """Returns the value of an option, with the type of `example`; raises ConfigError if it has none.

  Args:
    entry: The text of the sublayer.
    name: The name of the option.
    value: The text of the value.
    example: A valid value of the option.
  """
  if isinstance(example, str):
    choose("model.block", value, _NAMES[name], shown=entry)
    return value
  form = r"[1-9]\d{0,15}" if isinstance(example, int) else r"\d{1,15}(\.\d+)?"
  if not re.fullmatch(form, value) or not float(value):
    raise ConfigError(
      "model.block",
      entry,
      f"{name} must be a {'whole ' * isinstance(example, int)}number above 0, of "
      f"no more than 16 digits, as in {name}={example:g}",
    )
  return type(example)(value)


def write(kind: str, options: Mapping[str, Any]) -> str:
  """Returns the text of a sublayer; this is the inverse of `kind` and `options`."""
  return (
    kind
    + ":" * bool(options)
    + ",".join(
      f"{name}={value if isinstance(value, str) else f'{value:g}'}"
      for name, value in options.items()
    )
  )


def read(m: Config, entry: str) -> Config:
  """Returns config.model as a sublayer reads it, with the sublayer's options in place of its keys.

  The number of key-value heads changes in proportion to the number of heads. A gate selects its
  router, with the options that the config has for that router. A capacity is the router's own
  capacity factor, if it has one, or else model.moe.capacity_factor with the config's basis.
  """
  copy: Config = ConfigDict(m.to_dict())
  values = options(entry)
  with copy.ignore_type():
    for name, key in KEYS[kind(entry)].items():
      if name in values:
        copy.update_from_flattened_dict({key: values[name]})
    copy.num_kv_heads = max(copy.num_heads * m.num_kv_heads // m.num_heads, 1)
    if "gate" in values:
      copy.moe.router.name = GATES[values["gate"]]
    if "capacity" in values:
      router = copy.moe.router.name
      has_own = "capacity_factor" in ROUTERS[router].options
      section = copy.moe.router[router] if has_own else copy.moe
      section.capacity_factor = values["capacity"]
  return copy


def layout(m: Config) -> tuple[str, ...]:
  """Returns the entries of all blocks' sublayers, in order; () if the family has no sublayers."""
  return tuple(m.block) * m.num_layers if m.family == "brainformer" else ()


def own_models(m: Config) -> dict[str, Config]:
  """Returns config.model as each sublayer reads it, by the entries of model.block.

  In other families all layers read the same, and the result is {"": m}.
  """
  return {entry: read(m, entry) for entry in m.block} if m.family == "brainformer" else {"": m}


def sublayer_at(m: Config, path: Sequence[str]) -> str:
  """Returns the sublayer to which a parameter belongs, as a key of `own_models`.

  A parameter outside of all sublayers gets an arbitrary one.

  Args:
    m: The section `model` of the config.
    path: The names along the path of the parameter.
  """
  entries = layout(m)
  index = next((int(name.removeprefix("layer_")) for name in path if name.startswith("layer_")), 0)
  # Layers that are scanned are numbered within the pattern that repeats, which a prefix precedes.
  if path[0] == "repeats":
    index += find_pattern(entries).prefix
  return entries[index] if entries else ""
