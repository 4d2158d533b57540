"""Provides the device mesh and the table that maps array dimensions to its axes."""

from moe_jax.sharding.mesh import AXES, MeshOptions, make_mesh, mesh_sizes, nearest_meshes, platform
from moe_jax.sharding.readers import reader
from moe_jax.sharding.rules import (
  CHANGEABLE,
  RULES,
  ShardingOptions,
  batch_sharding,
  check_rules,
  constrain,
  param_shardings,
  replicated,
  spec,
  use_rules,
)

__all__ = [
  "AXES",
  "CHANGEABLE",
  "MeshOptions",
  "RULES",
  "ShardingOptions",
  "batch_sharding",
  "check_rules",
  "constrain",
  "make_mesh",
  "mesh_sizes",
  "nearest_meshes",
  "param_shardings",
  "platform",
  "reader",
  "replicated",
  "spec",
  "use_rules",
]
