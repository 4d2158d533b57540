"""Who holds which tokens and experts on a mesh, and the one `jax.shard_map` in which dispatchers
exchange them."""

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
  """Where a dispatcher's operands lie on a mesh; axes of one device are not mentioned.

  Attributes:
    tokens: mesh axes that split the groups.
    weights: the `PartitionSpec` of each leaf of the experts.
    expert: devices that share the experts.
    tensor: whether "tensor" splits the experts' hidden units, so that results are partial sums over
      it.
  """

  tokens: tuple[str, ...]
  weights: Any
  expert: int
  tensor: bool


def place(groups: int, experts: ExpertFunction, sizes: dict[str, int]) -> Place:
  """As `sharding.RULES` have it. Weights that "fsdp" splits come whole where it does not split the
  tokens, too."""
  tokens = _names(spec(("group",), (groups,), sizes))
  kept = (*tokens, "expert", "tensor")
  weights = jax.tree.map(
    lambda leaf, axes: PartitionSpec(
      *(entry if entry in kept else None for entry in spec(axes, leaf.shape, sizes))
    ),
    experts,
    experts.axes,
  )
  named = {name for leaf in jax.tree.leaves(weights) for name in _names(leaf)}
  return Place(tokens, weights, sizes["expert"] if "expert" in named else 1, "tensor" in named)


def over_mesh(
  alone: Local,
  exchange: Exchange | None,
  plan: RoutingPlan,
  x: Float[Array, "G S D"],
  experts: ExpertFunction,
) -> Float[Array, "G S D"]:
  """Runs a dispatcher on the current mesh (`jax.set_mesh`), each device on its own groups.

  Over the wires besides what `exchange` sends, per layer, forward, for one device:
    - fsdp: the other shards of its experts' weights, (fsdp - 1) / fsdp * 4 * 3DF/tensor bytes an
      expert (2DF without
      gate). The backward pass gathers them again, rather than keeping them, and reduce-scatters
        their gradients.
    - tensor: an all-reduce of the tokens' float32 sums, 2 (tensor - 1) / tensor * 4 T D bytes for T
      tokens. It comes
      after the weighted sum over experts, where there are fewer rows than the experts had.
    - data: the all-reduce of the weights' gradients.

  Args:
    alone: the mathematics of one device that holds all that the plan names; float32. Also used
      where there is no mesh, or one of one device.
    exchange: the same where each of that many devices of the axis "expert" holds its own groups and
      E / that many experts. None: the experts come to the tokens; all their weights are gathered,
      as those that fsdp splits.
    plan, x, experts: of all devices.

  Returns:
    y in x's dtype. Groups that the axis "expert" does not divide lie on it in copies; then each
      device adds up what its
    own experts make of them, and an all-reduce does the rest.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return alone(plan, x, experts).astype(x.dtype)
  where = place(x.shape[0], experts, dict(mesh.shape))
  resident = (
    where.expert == 1 or exchange is None and "expert" in where.tokens
  )  # all experts, once gathered
  gathered = [
    axis for axis in (("fsdp", "expert") if resident else ("fsdp",)) if axis in where.tokens
  ]
  axes = (
    {*where.tokens}
    | ({"expert"} if where.expert > 1 else set())
    | ({"tensor"} if where.tensor else set())
  )

  def local(plan, x, experts):
    experts = _gather(experts, where.weights, gathered)
    if resident:
      y = alone(plan, x, experts)
    elif "expert" in where.tokens:
      y = exchange(plan, x, experts, where.expert)
    else:
      y = jax.lax.psum(alone(own_experts(plan, experts.num_experts), x, experts), "expert")
    return (jax.lax.psum(y, "tensor") if where.tensor else y).astype(x.dtype)

  def body(plan, x, experts):
    plan, x = jax.tree.map(lambda leaf: _vary(leaf, axes - {*where.tokens}), (plan, x))
    experts = jax.tree.map(
      lambda leaf, at: _vary(leaf, axes - {*_names(at)}), experts, where.weights
    )
    run = jax.checkpoint(local, policy=_keep_all_but_weights(gathered)) if gathered else local
    return run(plan, x, experts)

  groups = PartitionSpec(where.tokens or None)
  return jax.shard_map(
    body, in_specs=(groups, groups, where.weights), out_specs=groups, check_vma=True
  )(plan, x, experts)


def own_experts(plan: RoutingPlan, count: int) -> RoutingPlan:
  """Of a plan, what names this device's `count` experts, which become 0 to count - 1; all others
  name nobody."""
  own = plan.expert - count * jax.lax.axis_index("expert").astype(plan.expert.dtype)
  here = (own >= 0) & (own < count)
  return RoutingPlan(
    token=plan.token,
    expert=jnp.where(here, own, count),
    gate=jnp.where(here, plan.gate, 0.0),
    num_experts=count,
  )


def to_experts(rows: Float[Array, "E G C D"]) -> Float[Array, "E G C D"]:
  """Buffers from where their tokens lie to where their experts lie, for dispatchers that leave the
  rest to GSPMD.

  Named in two steps, this becomes an all-to-all; where only the second is named, an all-gather of
  all buffers.
  """
  rows = constrain(rows, None, "group", None, None)
  return constrain(rows, "expert", "group_at_expert", None, None)


def to_tokens(rows: Float[Array, "E G C D"]) -> Float[Array, "E G C D"]:
  """The way back of `to_experts`."""
  rows = constrain(rows, "expert", "group_at_expert", None, None)
  return constrain(rows, None, "group", None, None)


def _gather(experts: ExpertFunction, specs: Any, axes: list[str]) -> ExpertFunction:
  def whole(leaf, at):
    for dimension, entry in enumerate(at):
      if entry in axes:
        leaf = jax.lax.all_gather(leaf, entry, axis=dimension, tiled=True)
    return leaf

  return jax.tree.map(whole, experts, specs)


def _keep_all_but_weights(gathered: list[str]) -> Callable[..., bool]:
  """What the backward pass finds already there: everything except gathered weights and casts, such
  as theirs."""

  def keep(primitive, *_, **params):
    gathers = primitive.name == "all_gather" and {*params["axis_name"]} <= {*gathered}
    return not gathers and primitive.name != "convert_element_type"

  return keep


def _names(at: PartitionSpec) -> tuple[str, ...]:
  """The mesh axes that a `PartitionSpec` mentions."""
  return tuple(
    name for entry in at if entry for name in ((entry,) if isinstance(entry, str) else entry)
  )


def _vary(leaf: Array, axes: set[str]) -> Array:
  """`leaf`, to be seen as different on each device of these axes: then all that is made of it may
  be."""
  return jax.lax.pcast(leaf, tuple(sorted(axes)), to="varying") if axes else leaf
