"""The weights of a model by names that do not depend on how its layers are compiled.

A model stores the layers of its repeating pattern stacked, as `repeats/layer_<j>/...` with a
leading axis, where the pattern depends on the depth and on which layers have experts. The unrolled
name of a weight is `layer_<l>/...` for layer l, whatever the pattern is. In an encoder-decoder,
`encoder/` or `decoder/` comes before it. The bias of loss-free balancing is a row of one array for
each layer; its unrolled name is `layer_<l>/balancing_bias`.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from moe_jax import assembly, sharding
from moe_jax.assembly.experts import encoder_layers, has_experts, layer_kinds
from moe_jax.models import find_pattern
from moe_jax.options import Config

BIAS = "balancing_bias"


class Leaf(NamedTuple):
  """An array of the model's variables.

  Attributes:
    path: Its path, such as ("params", "repeats", "layer_0", "ffn", "up").
    shape: Its shape.
    names: The unrolled names of its weights. There are several exactly if `stacked`.
    stacked: Whether the first axis counts the entries of `names`.
    place: Where the array lives on the mesh.
  """

  path: tuple[str, ...]
  shape: tuple[int, ...]
  names: tuple[str, ...]
  stacked: bool
  place: jax.sharding.NamedSharding

  @property
  def each(self) -> tuple[int, ...]:
    """The shape of one of the named weights."""
    return self.shape[1:] if self.stacked else self.shape


def layers(m: Config) -> dict[str, tuple[bool, ...]]:
  """Returns for each stack of layers, by the beginning of their names, which have experts.

  Args:
    m: The section `model` of the config.
  """
  return _stacks(m, has_experts(m))


def _stacks(m: Config, every: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
  """Returns what there is for each layer, by the beginning of the names of its stack."""
  split = encoder_layers(m)
  return {"encoder/": every[:split], "decoder/": every[split:]} if split else {"": every}


def leaves(config: Config, vocab_size: int, mesh: jax.sharding.Mesh) -> list[Leaf]:
  """Returns the variables of a config's model, in the order of `jax.tree.leaves`.

  Args:
    config: A config of the family "decoder" or "encoder_decoder".
    vocab_size: The number of ids in the data; see `assembly.abstract_variables`.
    mesh: The mesh on which the variables live.
  """
  with sharding.use_rules(dict(config.sharding)):
    boxed = assembly.abstract_variables(config, vocab_size)
    places = sharding.param_shardings(mesh, boxed)
  m = config.model
  found = []
  for (path, leaf), place in zip(
    jax.tree_util.tree_leaves_with_path(nn.unbox(boxed)), jax.tree.leaves(places), strict=True
  ):
    keys = tuple(key.key for key in path)
    names, stacked = _names(keys, layers(m), _stacks(m, layer_kinds(m)))
    found.append(Leaf(keys, tuple(leaf.shape), names, stacked, place))
  return found


def _names(
  path: Sequence[str], stacks: Mapping[str, Sequence[bool]], kinds: Mapping[str, Sequence[Hashable]]
) -> tuple[tuple[str, ...], bool]:
  """Returns the unrolled names of an array's weights, and whether a first axis counts them.

  Args:
    path: The path of the array.
    stacks: The result of `layers`.
    kinds: The kinds of the layers of each stack (`layer_kinds`).
  """
  collection, *parts = path
  if collection == "router_state":
    (with_experts,) = stacks.values()
    name = BIAS if parts == ["bias"] else f"balancing_{parts[0]}"
    return tuple(f"layer_{i}/{name}" for i, experts in enumerate(with_experts) if experts), True
  stack = f"{parts[0]}/"
  if stack in stacks:
    parts = parts[1:]
  else:
    stack = ""
  if parts[0] != "repeats":
    return (stack + "/".join(parts),), False
  match = re.fullmatch(r"layer_(\d+)", parts[1])
  assert match, f"a scan has only layers, and no {parts[1]}"
  pattern = find_pattern(kinds[stack])
  first = pattern.prefix + int(match[1])
  rest = "/".join(parts[2:])
  names = (f"{stack}layer_{first + r * pattern.period}/{rest}" for r in range(pattern.repeats))
  return tuple(names), True


def nested(paths: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
  """Returns the nested dict that has these values at these paths."""
  tree: dict[str, Any] = {}
  for path, value in paths.items():
    node = tree
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = value
  return tree
