"""The sublayers of a Brainformer's block: from their text in `config.model.block` to what each
one's layer reads."""

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

# What an option of a sublayer takes the place of, in config.model; `gate` and `capacity` are the
# router's, see `read`.
KEYS: Mapping[str, Mapping[str, str]] = {
  "attention": {"width": "d_model", "heads": "num_heads"},
  "ffn": {"width": "d_model", "hidden": "d_ff", "activation": "activation"},
  "moe": {"width": "d_model", "hidden": "moe.d_ff", "activation": "moe.activation"},
}
# The paper's gates, by routers: GLaM's, which it compares itself with, and Expert Choice.
GATES = {"top_2": "gshard", "expert_choice": "expert_choice"}
_NAMES = {"activation": ACTIVATIONS, "gate": GATES}


def kind(entry: str) -> str:
  """ "attention", "ffn" or "moe"."""
  return choose("model.block", entry.partition(":")[0], tuple(SEARCH_SPACE), shown=entry)


def options(entry: str) -> dict[str, Any]:
  """What a sublayer says of itself: "moe:gate=top_2,hidden=2048" -> {"gate": "top_2", "hidden":
  2048}.

  Raises:
    ConfigError: an unknown kind of sublayer, an option that it has not or has twice, a value that
      is none.
  """
  known, found = SEARCH_SPACE[kind(entry)], {}
  for part in filter(None, entry.partition(":")[2].split(",")):
    name, _, value = part.partition("=")
    example = choose("model.block", name, known, shown=entry)[0]
    if name in found:
      raise ConfigError("model.block", entry, f"{name} stands there twice; give it once")
    found[name] = _value(entry, name, value, example)
  return found


def _value(entry: str, name: str, value: str, example: int | float | str) -> int | float | str:
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
  """The text of a sublayer; `options` reads it."""
  return (
    kind
    + ":" * bool(options)
    + ",".join(
      f"{name}={value if isinstance(value, str) else f'{value:g}'}"
      for name, value in options.items()
    )
  )


def read(m: Config, entry: str) -> Config:
  """config.model as this sublayer reads it: with what it says of itself in place of the keys that
  all share.

  Heads bring key-value heads in the config's proportion. A gate brings its router, with the options
  that the config has for it. A capacity is the router's own capacity factor, where it has one, or
  model.moe.capacity_factor, with the config's basis.
  """
  own: Config = ConfigDict(m.to_dict())
  said = options(entry)
  with own.ignore_type():
    for name, key in KEYS[kind(entry)].items():
      if name in said:
        own.update_from_flattened_dict({key: said[name]})
    own.num_kv_heads = max(own.num_heads * m.num_kv_heads // m.num_heads, 1)
    if "gate" in said:
      own.moe.router.name = GATES[said["gate"]]
    if "capacity" in said:
      router = own.moe.router.name
      place = own.moe.router[router] if "capacity_factor" in ROUTERS[router].options else own.moe
      place.capacity_factor = said["capacity"]
  return own


def layout(m: Config) -> tuple[str, ...]:
  """The sublayers of all blocks, in order; () in another family than Brainformer's."""
  return tuple(m.block) * m.num_layers if m.family == "brainformer" else ()


def own_models(m: Config) -> dict[str, Config]:
  """entry of the block -> config.model as it reads it; {"": m} in other families, whose layers all
  read the same."""
  return {entry: read(m, entry) for entry in m.block} if m.family == "brainformer" else {"": m}


def sublayer_at(m: Config, path: Sequence[str]) -> str:
  """The entry of the block, a key of `own_models`, that a parameter belongs to; any where it
  belongs to none."""
  entries = layout(m)
  place = next((int(name.removeprefix("layer_")) for name in path if name.startswith("layer_")), 0)
  if path[0] == "repeats":
    place += find_pattern(entries).prefix
  return entries[place] if entries else ""
