"""Blocks one after the other, pre-norm ones or others, with the stretch of layers that repeats
compiled once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, UInt32

from moe_jax.layers import Aux, LayerContext, LayerRouting, Microbatch, concatenate, stack
from moe_jax.models.pattern import Pattern, find_pattern
from moe_jax.routing import RoutingPlan
from moe_jax.routing.hash_layer import mix

Factory = Callable[..., nn.Module]  # takes a name, returns a module

# What a rematerialised layer keeps for its backward pass besides its input. None: nothing is
# recomputed.
REMAT = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  # products with weights; not attention scores
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

LAYER_REDUCE = {"mean": jnp.mean, "sum": jnp.sum}


class Stack(nn.Module):
  """Blocks one after the other, with their Aux stacked: the body of the scan.

  Attributes:
    blocks: factories of the blocks, which are named layer_0, layer_1, ...
    has_experts: which of them have experts; they take the rows of `routing` in order.
  """

  blocks: Sequence[Factory]
  has_experts: Sequence[bool]

  @nn.compact
  def __call__(
    self, x: Float[Array, "B L D"], context: LayerContext, routing: LayerRouting
  ) -> tuple[Float[Array, "B L D"], Aux]:
    auxes = []
    for i, (make, has_experts) in enumerate(zip(self.blocks, self.has_experts, strict=True)):
      own = rows(routing, sum(self.has_experts[:i])) if has_experts else None
      x, aux = make(name=f"layer_{i}")(x, context, own)
      auxes.append(aux)
    return x, stack(auxes)


def make_block(block: type[nn.Module], remat: str, scanned: bool, **parts: Any) -> Factory:
  """Returns a factory of a block of these parts.

  Args:
    block: The class of the block.
    remat: A key of `REMAT`.
    scanned: Whether the block is in the body of a scan.
    parts: The fields of the block.
  """
  policy = REMAT[remat]
  # Under scan, nothing can undo the recomputation, so there is no need to fence it off from the
  # compiler.
  block = block if policy is None else nn.remat(block, policy=policy, prevent_cse=not scanned)
  return functools.partial(block, **parts)


def run_layers(
  block: Callable[[Hashable, bool], Factory],
  has_experts: Sequence[bool],
  scan_layers: bool,
  x: Float[Array, "B L D"],
  context: LayerContext,
  routing: LayerRouting,
  kinds: Sequence[Hashable] | None = None,
) -> tuple[Float[Array, "B L D"], Aux]:
  """Single layers, the scanned repeats, single layers; to be called in a compact method, whose
  module owns them.

  Args:
    block: (its kind, whether it is scanned) -> a factory of that block.
    has_experts: for each layer, whether it has experts; those that do take the rows of `routing` in
      order.
    scan_layers: compile the repeating stretch once (`find_pattern`).
    x: the first layer's input.
    context: what every layer sees.
    routing: of all the layers with experts.
    kinds: for each layer, what `block` is told of it; layers of one kind are alike. None: whether
      it has experts.
  """
  layers, kinds = range(len(has_experts)), has_experts if kinds is None else kinds
  pattern = find_pattern(kinds if scan_layers else layers)

  def row(layer):
    return sum(has_experts[:layer])  # of the first layer with experts from `layer` on

  auxes = []
  repeats = [pattern.scanned] if pattern.repeats else []
  for layer in (*layers[: pattern.prefix], *repeats, *layers[pattern.scanned.stop :]):
    if isinstance(layer, range):
      own = rows(routing, slice(row(layer.start), row(layer.stop)))
      own = jax.tree.map(lambda leaf: leaf.reshape(pattern.repeats, -1, *leaf.shape[1:]), own)
      x, aux = _repeats(block, kinds, has_experts, pattern)(x, context, own)
      auxes.append(
        jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), aux)
      )  # [repeats * period's Lm, ...]
    else:
      own = rows(routing, row(layer)) if has_experts[layer] else None
      x, aux = block(kinds[layer], False)(name=f"layer_{layer}")(x, context, own)
      auxes.append(stack([aux]))
  return x, concatenate(auxes)


def _repeats(
  block: Callable[[Hashable, bool], Factory],
  kinds: Sequence[Hashable],
  has_experts: Sequence[bool],
  pattern: Pattern,
) -> nn.Module:
  period = slice(pattern.prefix, pattern.prefix + pattern.period)
  scanned = nn.scan(
    Stack,
    length=pattern.repeats,
    in_axes=(nn.broadcast, 0),
    out_axes=0,
    variable_axes={"params": 0},
    split_rngs={"params": True, "dropout": True, "router": True},
    metadata_params={nn.PARTITION_NAME: "layers"},
  )
  return scanned(
    tuple(block(kind, True) for kind in kinds[period]), tuple(has_experts[period]), name="repeats"
  )


def balancing_bias(
  module: nn.Module, num_layers: int, num_experts: int
) -> Float[Array, "Lm E"] | None:
  """What loss-free balancing adds to the experts' scores, for each layer with experts; starts at 0.

  A variable of `module` in the collection "router_state"; None without `num_experts`.
  """
  if not num_experts:
    return None
  return module.variable(
    "router_state", "bias", jnp.zeros, (num_layers, num_experts), jnp.float32
  ).value


def update_router_state(
  router_state: Mapping[str, Array], assigned: Int[Array, "Lm E"], rate: float
) -> Mapping[str, Array]:
  """One step of loss-free balancing (arXiv 2408.15664, Algorithm 1): b += rate * sign(mean load -
  load).

  Args:
    router_state: the collection "router_state": {"bias": [Lm, E]}; an empty one stays empty.
    assigned: how many assignments of the whole batch name each expert, over all devices and
      microbatches. Counts are exact: an expert of mean load keeps its bias, whereas shares would
      round to either side of their mean.
    rate: u, in units of probability.
  """
  if not router_state:
    return router_state
  # mean - count has the sign of (whole part of the mean) - count, or where this is 0, of the rest.
  # Counts times E, or counts in float32, could be too large to be exact.
  whole, rest = jnp.divmod(jnp.sum(assigned, axis=-1, keepdims=True), assigned.shape[-1])
  sign = jnp.sign(whole - assigned) + ((whole == assigned) & (rest > 0))
  return {"bias": router_state["bias"] + rate * sign}


def layer_salts(seed: int | Int[Array, ""], num_layers: int) -> UInt32[Array, "Lm"]:
  """`RoutingContext.salt` of each layer with experts, by its index among them: a hash of (seed,
  index)."""
  return mix(jnp.arange(num_layers), seed)


def outside_routing(
  model: nn.Module, stored: RoutingPlan | None = None, micro: Microbatch | None = None
) -> LayerRouting:
  """What the routers get from outside, for a model with the fields `has_experts`,
  `num_biased_experts` and `seed`.

  To be called in a compact method of the model, which owns the balancing bias. The layers with
  experts are counted through the whole model, so that no two of them have the same salt, whichever
  of them are scanned.
  """
  layers = sum(model.has_experts)
  return LayerRouting(
    balancing_bias(model, layers, model.num_biased_experts),
    stored,
    shares=micro.shares if micro else {},
    salt=layer_salts(model.seed, layers),
  )


def rows(routing: LayerRouting, index: int | slice) -> LayerRouting:
  """The rows of some layers with experts."""
  return jax.tree.map(lambda leaf: leaf[index], routing)
