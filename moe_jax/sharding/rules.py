"""Maps the logical axes of arrays to mesh axes with one table, which a config may change.

Parameters get their logical axes from `nn.with_logical_partitioning`, and activations get them from
`constrain`. Flax's own `nn.with_logical_constraint` takes its rules from a context manager and
silently does nothing without one. `constrain` always reads the table here, and does nothing only if
no mesh is set with `jax.set_mesh`. (The older `with mesh:` does not set one.)
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

# The mesh axes over which a dimension with this logical axis is split. () means that every device
# holds the whole dimension. A name that is missing here raises an error, because its dimension
# would otherwise silently be replicated.
RULES: Mapping[str, tuple[str, ...]] = {
  # Parameters.
  "vocab": ("tensor",),
  # In the weights of experts the first dimension already uses "expert", so that this one is split
  # over "fsdp" alone.
  "embed": ("fsdp", "expert"),
  "heads": ("tensor",),
  "kv_heads": ("tensor",),
  "head_dim": (),
  "mlp": ("tensor",),
  "expert": ("expert",),
  # The router's outputs are whole, because every device routes its own tokens to all experts.
  "router": (),
  "norm": (),
  "layers": (),  # the stacked layers of nn.scan
  # Activations.
  "batch": ("data", "fsdp", "expert"),
  "length": (),
  # Groups of tokens that are routed together, while their rows lie with the tokens.
  "group": ("data", "fsdp", "expert"),
  # Groups while their rows lie with the experts, whose own dimension uses "expert".
  "group_at_expert": ("data", "fsdp"),
  "act_embed": (),
  "act_heads": ("tensor",),
  "act_mlp": ("tensor",),
  "act_vocab": ("tensor",),
}
# `config.sharding` cannot change these axes, because the `jax.shard_map` of the dispatchers and the
# readers of the data are written for this layout.
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
# The axes of experts' weights. Dispatchers gather these weights over "fsdp" and "expert" and sum
# their products over "tensor", so that a config may only leave mesh axes out.
_EXPERT_WEIGHT_AXES = ("expert", "embed", "mlp")

# The rules that replace the table's, as a tuple of items. They are part of the key under which
# `jax.jit` caches a program, so that other rules cause a new compilation.
_changes = jax.make_user_context(())


def use_rules(rules: Mapping[str, Sequence[str]]) -> AbstractContextManager:
  """Returns a context manager within which `rules` replace entries of the table.

  Args:
    rules: Logical axis to mesh axes, such as `config.sharding`.

  Raises:
    ConfigError: As for `check_rules`.
  """
  check_rules(rules)
  return _changes(tuple(sorted((axis, tuple(mesh_axes)) for axis, mesh_axes in rules.items())))


def check_rules(rules: Mapping[str, Sequence[str]]) -> None:
  """Checks rules that are to replace entries of the table.

  Args:
    rules: Logical axis to mesh axes, such as `config.sharding`.

  Raises:
    ConfigError: If a logical axis or a mesh axis is unknown (the message names the nearest), if the
      mesh axes are not a sequence of names or contain a name twice, if the axis is in `FIXED`, or
      if an axis of experts' weights gets a mesh axis that it does not have in the table.
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
    if axis in _EXPERT_WEIGHT_AXES and not set(mesh_axes) <= set(RULES[axis]):
      raise ConfigError(
        field,
        tuple(mesh_axes),
        f"dispatchers know how to join experts' weights over {RULES[axis]}; "
        "leave some of these out, or all",
      )


def spec(
  axes: Sequence[str | None], shape: Sequence[int], sizes: Mapping[str, int]
) -> PartitionSpec:
  """Returns the `PartitionSpec` of an array, from its logical axes and the current rules.

  A dimension is split over its mesh axes as long as they divide it: the last mesh axes are left out
  until the product of the sizes divides the dimension. For example, on data=4 expert=2 four groups
  are split over data alone. A vocabulary of 257 on tensor=2, or a batch of one, is not split at
  all. Devices along the axes that are left out hold copies. If two dimensions have the same mesh
  axis, the first one uses it.

  Args:
    axes: The logical axis of each dimension. None means that the dimension is not split.
    shape: The size of each dimension.
    sizes: Mesh axis name to size. A missing axis has size 1.

  Raises:
    KeyError: If a logical axis is not in the table.
  """
  used: set[str] = set()
  rules = {**RULES, **dict(_changes.value)}
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
  """Constrains the layout of `x` on the current mesh, or returns `x` unchanged if none is set.

  Args:
    x: Any array.
    *axes: The logical axis of each dimension. None means that the dimension is not split.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, dict(mesh.shape)))


def param_shardings(mesh: jax.sharding.Mesh, variables: Any) -> Any:
  """Returns the `NamedSharding` of every variable, in the structure of `nn.unbox(variables)`.

  Args:
    mesh: The mesh.
    variables: The result of `jax.eval_shape(model.init, ...)`, still with its Flax boxes, which
      carry the logical axes. Leaves without a box are replicated.
  """

  def leaf_sharding(leaf):
    if not isinstance(leaf, nn.LogicallyPartitioned):
      return NamedSharding(mesh, PartitionSpec())
    return NamedSharding(mesh, spec(leaf.names, leaf.value.shape, dict(mesh.shape)))

  return jax.tree.map(
    leaf_sharding, variables, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
  )


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Returns the sharding of a batch `[B, ...]`: rows over data, fsdp and expert.

  Devices that differ only along tensor hold copies.
  """
  return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Returns the sharding that puts a whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())
