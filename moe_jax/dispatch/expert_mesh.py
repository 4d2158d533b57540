"""Placement of tokens and experts on a mesh, and the `jax.shard_map` that dispatchers run in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from moe_jax.dispatch.expert_function import ExpertFunction
from moe_jax.routing.plan import RoutingPlan
from moe_jax.sharding import constrain, spec

Local = Callable[[RoutingPlan, Float[Array, "G S D"], ExpertFunction], Float[Array, "G S D"]]
Exchange = Callable[
  [RoutingPlan, Float[Array, "G S D"], ExpertFunction, int], Float[Array, "G S D"]
]


@dataclasses.dataclass(frozen=True)
class Place:
  """The placement of the operands of a dispatcher on a mesh.

  Mesh axes with one device are left out.

  Attributes:
    tokens: The mesh axes that split the groups.
    weights: The `PartitionSpec` of each leaf of the experts.
    expert: The number of devices over which the experts are split.
    tensor: Whether the axis "tensor" splits the hidden units of the experts, so that results are
      partial sums over it.
  """

  tokens: tuple[str, ...]
  weights: Any
  expert: int
  tensor: bool


def place(groups: int, experts: ExpertFunction, sizes: dict[str, int]) -> Place:
  """Returns the placement that `sharding.RULES` define.

  Weights that "fsdp" splits enter the dispatcher unsplit if "fsdp" does not split the tokens.

  Args:
    groups: The number of groups of tokens, G.
    experts: The experts, of which only shapes and logical axes are read.
    sizes: The number of devices of each mesh axis.
  """
  tokens = _names(spec(("group",), (groups,), sizes))
  kept_axes = (*tokens, "expert", "tensor")
  weights = jax.tree.map(
    lambda leaf, axes: PartitionSpec(
      *(entry if entry in kept_axes else None for entry in spec(axes, leaf.shape, sizes))
    ),
    experts,
    experts.axes,
  )
  used_axes = {name for leaf in jax.tree.leaves(weights) for name in _names(leaf)}
  return Place(
    tokens, weights, sizes["expert"] if "expert" in used_axes else 1, "tensor" in used_axes
  )


def over_mesh(
  alone: Local,
  exchange: Exchange | None,
  plan: RoutingPlan,
  x: Float[Array, "G S D"],
  experts: ExpertFunction,
) -> Float[Array, "G S D"]:
  """Runs a dispatcher on the current mesh (`jax.set_mesh`), where each device has its own groups.

  In addition to the communication of `exchange`, one device sends in each layer:

    - fsdp: the other shards of the weights of its experts, (fsdp - 1) / fsdp * 4 * 3DF/tensor bytes
      per expert (2DF without gate) in the forward pass. The backward pass gathers them again, so
      that they need not be kept, and reduce-scatters their gradients.
    - tensor: an all-reduce of the float32 sums of the tokens, 2 (tensor - 1) / tensor * 4 T D bytes
      for T tokens in the forward pass. It comes after the weighted sum over experts, because there
      are fewer tokens than rows of experts.
    - data: the all-reduce of the gradients of the weights.

  If the axis "expert" does not split the groups, all its devices hold copies of the groups. Each
  device then sums the results of its own experts, and an all-reduce adds these sums up.

  Args:
    alone: The computation of one device that holds all experts that the plan names. It returns
      float32. It is also used without a mesh, or on a mesh with one device.
    exchange: The computation of one of n devices of the axis "expert", each of which holds its own
      groups and E/n experts. Its last argument is n. None means that tokens stay where they are and
      all weights are gathered over this axis, as they are over fsdp.
    plan: The plan of all devices.
    x: The tokens of all devices.
    experts: The experts of all devices.

  Returns:
    The outputs y in the dtype of x.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return alone(plan, x, experts).astype(x.dtype)
  placement = place(x.shape[0], experts, dict(mesh.shape))
  # Whether each device has all experts once the weights are gathered.
  has_all_experts = placement.expert == 1 or exchange is None and "expert" in placement.tokens
  gathered = [
    axis
    for axis in (("fsdp", "expert") if has_all_experts else ("fsdp",))
    if axis in placement.tokens
  ]
  axes = (
    {*placement.tokens}
    | ({"expert"} if placement.expert > 1 else set())
    | ({"tensor"} if placement.tensor else set())
  )

  def local(plan, x, experts):
    experts = _gather(experts, placement.weights, gathered)
    if placement.tensor:
      experts = _count_once(experts, placement.weights)
    if has_all_experts:
      y = alone(plan, x, experts)
    elif exchange is not None and "expert" in placement.tokens:
      y = exchange(plan, x, experts, placement.expert)
    else:
      y = jax.lax.psum(alone(own_experts(plan, experts.num_experts), x, experts), "expert")
    return (jax.lax.psum(y, "tensor") if placement.tensor else y).astype(x.dtype)

  def body(plan, x, experts):
    # The computation combines plan, tokens and weights. All of them must vary over the same mesh
    # axes to satisfy `check_vma`, and their gradients are then summed over the axes added here.
    plan, x = jax.tree.map(lambda leaf: _vary(leaf, axes - {*placement.tokens}), (plan, x))
    experts = jax.tree.map(
      lambda leaf, at: _vary(leaf, axes - {*_names(at)}), experts, placement.weights
    )
    run = jax.checkpoint(local, policy=_keep_all_but_weights(gathered)) if gathered else local
    return run(plan, x, experts)

  groups = PartitionSpec(placement.tokens or None)
  return jax.shard_map(
    body, in_specs=(groups, groups, placement.weights), out_specs=groups, check_vma=True
  )(plan, x, experts)


def own_experts(plan: RoutingPlan, count: int) -> RoutingPlan:
  """Returns the plan restricted to the `count` experts of this device.

  These experts are renumbered from 0 to count - 1. All other assignments get `expert` `count`,
  which stands for no expert, and gate 0.
  """
  local_expert = plan.expert - count * jax.lax.axis_index("expert").astype(plan.expert.dtype)
  is_own = (local_expert >= 0) & (local_expert < count)
  return RoutingPlan(
    token=plan.token,
    expert=jnp.where(is_own, local_expert, count),
    gate=jnp.where(is_own, plan.gate, 0.0),
    num_experts=count,
  )


def to_experts(rows: Float[Array, "E G C D"]) -> Float[Array, "E G C D"]:
  """Moves buffers from the devices of their tokens to those of their experts, by GSPMD.

  The two constraints make GSPMD insert an all-to-all. With the second constraint alone, it would
  insert an all-gather of all buffers.
  """
  rows = constrain(rows, None, "group", None, None)
  return constrain(rows, "expert", "group_at_expert", None, None)


def to_tokens(rows: Float[Array, "E G C D"]) -> Float[Array, "E G C D"]:
  """Moves buffers from the devices of their experts back to those of their tokens, by GSPMD."""
  rows = constrain(rows, "expert", "group_at_expert", None, None)
  return constrain(rows, None, "group", None, None)


def _gather(experts: ExpertFunction, specs: Any, axes: list[str]) -> ExpertFunction:
  """All-gathers the weights of the experts over the mesh axes in `axes`."""

  def whole(leaf, at):
    for dimension, entry in enumerate(at):
      if entry in axes:
        leaf = jax.lax.all_gather(leaf, entry, axis=dimension, tiled=True)
    return leaf

  return jax.tree.map(whole, experts, specs)


def _count_once(experts: ExpertFunction, specs: Any) -> ExpertFunction:
  """Returns the experts of one shard of "tensor", whose outputs are terms of a sum over the shards.

  Leaves that all shards hold in full, such as the biases of outputs, stay only on the first one.
  """
  is_first = jax.lax.axis_index("tensor") == 0

  def once(leaf, at):
    return leaf if "tensor" in _names(at) else jnp.where(is_first, leaf, 0)

  return jax.tree.map(once, experts, specs)


def _keep_all_but_weights(gathered: list[str]) -> Callable[..., bool]:
  """Returns a rematerialisation policy that saves everything except gathered weights and casts.

  The weights are gathered and cast again in the backward pass. Casts are excluded, because
  otherwise the casts of the gathered weights would be saved.
  """

  def keep(primitive, *_, **params):
    gathers = primitive.name == "all_gather" and {*params["axis_name"]} <= {*gathered}
    return not gathers and primitive.name != "convert_element_type"

  return keep


def _names(at: PartitionSpec) -> tuple[str, ...]:
  """Returns the mesh axes that a `PartitionSpec` mentions."""
  return tuple(
    name for entry in at if entry for name in ((entry,) if isinstance(entry, str) else entry)
  )


def _vary(leaf: Array, axes: set[str]) -> Array:
  """Marks `leaf` as varying over `axes`, so that values derived from it may differ by device."""
  return jax.lax.pcast(leaf, tuple(sorted(axes)), to="varying") if axes else leaf
