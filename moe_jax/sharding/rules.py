"""ONE table from logical axis to mesh axes, what a config changes in it, and the three things that
read it.

Parameters get their logical axes from `nn.with_logical_partitioning`, activations from `constrain`.
Flax's own `nn.with_logical_constraint` needs its rules from a context manager and is silent when
there is none; `constrain` reads the table, and does nothing only where no mesh is set
(`jax.set_mesh`; the older `with mesh:` does not count).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Annotated, Any

import jax
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from moe_jax.errors import ConfigError, choose
from moe_jax.options import Options, Text, option
from moe_jax.sharding.mesh import AXES

# A name that is not in the table is an error: it would silently be replicated.
RULES: Mapping[str, tuple[str, ...]] = {
  # parameters
  "vocab": ("tensor",),
  "embed": ("fsdp", "expert"),  # of experts, whose first dimension has "expert", over fsdp alone
  "heads": ("tensor",),
  "kv_heads": ("tensor",),
  "head_dim": (),
  "mlp": ("tensor",),
  "expert": ("expert",),
  "router": (),  # the router's outputs: every device routes its own tokens to all experts
  "norm": (),
  "layers": (),  # stacked by nn.scan
  # activations
  "batch": ("data", "fsdp", "expert"),
  "length": (),
  "group": (
    "data",
    "fsdp",
    "expert",
  ),  # groups of tokens that are routed together, while they lie with their tokens
  "group_at_expert": (
    "data",
    "fsdp",
  ),  # the same, while their rows lie with the experts, which have "expert"
  "act_embed": (),
  "act_heads": ("tensor",),
  "act_mlp": ("tensor",),
  "act_vocab": ("tensor",),
}
# What `config.sharding` cannot change: the dispatchers' `jax.shard_map` and the readers of the data
# are written for it.
FIXED = ("batch", "group", "group_at_expert")
CHANGEABLE = {axis: mesh_axes for axis, mesh_axes in RULES.items() if axis not in FIXED}
_MeshAxes = Annotated[tuple[str, ...], Text(f"must be an axis of the mesh: {', '.join(AXES)}")]
# The section `sharding` has a field for each logical axis that a config may change.
ShardingOptions = dataclasses.make_dataclass(
  "ShardingOptions",
  [
    (
      axis,
      _MeshAxes,
      option(mesh_axes, f"Mesh axes that split `{axis}`, from the first on as many as divide it."),
    )
    for axis, mesh_axes in CHANGEABLE.items()
  ],
  bases=(Options,),
  frozen=True,
)
_OF_EXPERTS = (
  "expert",
  "embed",
  "mlp",
)  # dispatchers gather over "fsdp" and "expert" and add up over "tensor"

# The rules that take the place of the table's, as a tuple of items; a part of what `jax.jit`
# remembers a program by.
_changes = jax.make_user_context(())


def use_rules(rules: Mapping[str, Sequence[str]]) -> AbstractContextManager:
  """A context in which these rules, as of `config.sharding`, take the place of the table's.

  Raises:
    ConfigError: see `check_rules`.
  """
  check_rules(rules)
  return _changes(tuple(sorted((axis, tuple(mesh_axes)) for axis, mesh_axes in rules.items())))


def check_rules(rules: Mapping[str, Sequence[str]]) -> None:
  """Refuses rules that nothing could follow.

  Raises:
    ConfigError: an unknown logical axis or mesh axis, with the nearest there is; one mesh axis
      twice; an axis whose layout others rely on.
  """
  for axis, mesh_axes in rules.items():
    field = f"sharding.{axis}"
    if axis in FIXED:
      raise ConfigError(
        field, mesh_axes, f"cannot be changed: dispatchers and data readers rely on {RULES[axis]}"
      )
    choose("sharding", axis, CHANGEABLE)
    if isinstance(mesh_axes, str):
      raise ConfigError(field, mesh_axes, f"must be a tuple of mesh axes, such as ({mesh_axes!r},)")
    for mesh_axis in mesh_axes:
      choose(field, mesh_axis, AXES, tuple(mesh_axes))
    if len(set(mesh_axes)) < len(mesh_axes):
      raise ConfigError(field, tuple(mesh_axes), "names a mesh axis twice")
    if axis in _OF_EXPERTS and not set(mesh_axes) <= set(RULES[axis]):
      raise ConfigError(
        field,
        tuple(mesh_axes),
        f"dispatchers know how to join experts' weights over {RULES[axis]}; "
        "leave some of these out, or all",
      )


def spec(
  axes: Sequence[str | None], shape: Sequence[int], sizes: Mapping[str, int]
) -> PartitionSpec:
  """The `PartitionSpec` of an array with these logical axes and this shape, on a mesh of these
  sizes.

  A dimension is split over as many of its mesh axes, from the first on, as divide it: four groups
  on data=4 expert=2 over data alone, a vocabulary of 257 over tensor=2 or a batch of one not at
  all. Devices along the others hold copies. A mesh axis is used for the first dimension that asks
  for it.
  """
  used: set[str] = set()
  rules = RULES | dict(_changes.value)
  entries = []
  for axis, dimension in zip(axes, shape, strict=True):
    mesh_axes = tuple(
      m for m in (rules[axis] if axis else ()) if sizes.get(m, 1) > 1 and m not in used
    )
    while dimension % math.prod(sizes[m] for m in mesh_axes):
      mesh_axes = mesh_axes[:-1]
    used.update(mesh_axes)
    entries.append(mesh_axes if len(mesh_axes) > 1 else mesh_axes[0] if mesh_axes else None)
  return PartitionSpec(*entries)


def constrain(x: Array, *axes: str | None) -> Array:
  """`x`, laid out over the current mesh by its logical axes; `x` itself where no mesh is set."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, dict(mesh.shape)))


def param_shardings(mesh: jax.sharding.Mesh, variables: Any) -> Any:
  """The `NamedSharding` of every variable, in the structure of `nn.unbox(variables)`.

  Args:
    mesh: the mesh.
    variables: what `jax.eval_shape(model.init, ...)` returns, its boxes still on. Leaves without a
      box are replicated.
  """

  def one(leaf):
    if not isinstance(leaf, nn.LogicallyPartitioned):
      return NamedSharding(mesh, PartitionSpec())
    return NamedSharding(mesh, spec(leaf.names, leaf.value.shape, dict(mesh.shape)))

  return jax.tree.map(
    one, variables, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
  )


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """How a batch `[B, ...]` is split: rows over data, fsdp and expert, copied over tensor."""
  return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """A whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())
