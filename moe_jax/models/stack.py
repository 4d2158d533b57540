"""Runs a stack of layers, and compiles the stretch of layers that repeats only once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, UInt32

from moe_jax.dispatch.expert_function import HIDDEN, RECEIVED, RETURNED
from moe_jax.layers import Aux, LayerContext, LayerRouting, Microbatch, concatenate, stack
from moe_jax.models.pattern import Pattern, find_pattern
from moe_jax.routing import RoutingPlan
from moe_jax.routing.hash_layer import mix

# What a block gets from the one before it: the residual stream, and the logits of the last layer
# with experts, which are None if no layer reads them.
Carry = tuple[Float[Array, "B L D"], Float[Array, "B L N"] | None]
Factory = Callable[..., nn.Module]  # takes a name, returns a module

# Name -> policy that says what a rematerialised layer keeps for its backward pass besides its
# input. None means that nothing is recomputed.
REMAT = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  # Keeps the outputs of products with weights, but not the attention scores.
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  # Keeps what layers with experts exchange between devices, so that nothing is sent again.
  "exchanges": jax.checkpoint_policies.save_only_these_names(RECEIVED, RETURNED),
  # Keeps also the pre-activations of experts, so that no matmul of an expert is done again.
  "experts": jax.checkpoint_policies.save_only_these_names(RECEIVED, HIDDEN, RETURNED),
}

LAYER_REDUCE = {"mean": jnp.mean, "sum": jnp.sum}


class Stack(nn.Module):
  """The body of the scan, which applies blocks one after the other and stacks their Aux.

  Attributes:
    blocks: Factories of the blocks, which are named layer_0, layer_1, ...
    has_experts: Whether each block has experts. Those that have take the rows of `routing` in
      order.
  """

  blocks: Sequence[Factory]
  has_experts: Sequence[bool]

  @nn.compact
  def __call__(
    self, carry: Carry, context: LayerContext, routing: LayerRouting
  ) -> tuple[Carry, Aux]:
    """Returns what the last block leaves, and the stacked Aux of the blocks with experts."""
    auxes = []
    for i, (make, has_experts) in enumerate(zip(self.blocks, self.has_experts, strict=True)):
      block_routing = rows(routing, sum(self.has_experts[:i])) if has_experts else None
      carry, aux = run_block(make(name=f"layer_{i}"), carry, context, block_routing)
      auxes.append(aux)
    return carry, stack(auxes)


def run_block(
  block: nn.Module, carry: Carry, context: LayerContext, routing: LayerRouting | None
) -> tuple[Carry, Aux]:
  """Returns what a block leaves for the next one, and its Aux without the logits in it."""
  x, before = carry
  x, aux = block(x, context.replace(before=before), routing)
  if aux.logits is None:
    return (x, before), aux
  return (x, aux.logits), aux.replace(logits=None)


def make_block(block: type[nn.Module], remat: str, scanned: bool, **parts: Any) -> Factory:
  """Returns a factory of a block with the fields `parts`.

  Args:
    block: The class of the block.
    remat: A key of `REMAT`.
    scanned: Whether the block is in the body of a scan.
    parts: The fields of the block.
  """
  policy = REMAT[remat]
  # Under scan, the compiler cannot merge the recomputation with the forward pass, so that the
  # barriers of prevent_cse are not needed.
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
  """Runs all layers: single ones, the scanned repetitions, and single ones again.

  It must be called in a compact method, whose module then owns the layers.

  Args:
    block: (kind of the layer, whether it is scanned) -> factory of the layer.
    has_experts: For each layer, whether it has experts. Those that have take the rows of `routing`
      in order.
    scan_layers: Whether the repeating stretch of layers is compiled once (`find_pattern`).
    x: Input of the first layer.
    context: The context of all layers. With `gate_residual`, its `before` is zeros.
    routing: The outside routing inputs of all layers with experts.
    kinds: For each layer, its kind. Layers of one kind are alike. None means that the kind is
      whether the layer has experts.

  Returns:
    The output of the last layer, and the Aux with a leading axis over the layers with experts.
  """
  layers, kinds = range(len(has_experts)), has_experts if kinds is None else kinds
  # The indices of the layers are all different, so that no pattern is found in them.
  pattern = find_pattern(kinds if scan_layers else layers)

  def row(layer):
    """Returns the row of the first layer with experts from `layer` on."""
    return sum(has_experts[:layer])

  auxes, carry = [], (x, context.before)
  repeats = [pattern.scanned] if pattern.repeats else []
  for layer in (*layers[: pattern.prefix], *repeats, *layers[pattern.scanned.stop :]):
    if isinstance(layer, range):
      scanned_routing = rows(routing, slice(row(layer.start), row(layer.stop)))
      # The scan runs over the leading axis, so it is split into [repeats, Lm of one repetition].
      scanned_routing = jax.tree.map(
        lambda leaf: leaf.reshape(pattern.repeats, -1, *leaf.shape[1:]), scanned_routing
      )
      carry, aux = _repeats(block, kinds, has_experts, pattern)(carry, context, scanned_routing)
      # Merges the two axes again, to [Lm of all repetitions, ...].
      auxes.append(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), aux))
    else:
      layer_routing = rows(routing, row(layer)) if has_experts[layer] else None
      one = block(kinds[layer], False)(name=f"layer_{layer}")
      carry, aux = run_block(one, carry, context, layer_routing)
      auxes.append(stack([aux]))
  return carry[0], concatenate(auxes)


def _repeats(
  block: Callable[[Hashable, bool], Factory],
  kinds: Sequence[Hashable],
  has_experts: Sequence[bool],
  pattern: Pattern,
) -> nn.Module:
  """Returns the module `repeats`, which scans over the repetitions of the pattern."""
  period = slice(pattern.prefix, pattern.prefix + pattern.period)
  scanned = nn.scan(
    Stack,
    length=pattern.repeats,
    # All repetitions see the same context, and each sees its own rows of the routing. The stub of
    # nn.scan knows only int, but a tuple with an entry per argument is documented.
    in_axes=(nn.broadcast, 0),  # pyright: ignore[reportArgumentType]
    out_axes=0,
    variable_axes={"params": 0, "cache": 0},
    split_rngs={"params": True, "dropout": True, "router": True},
    metadata_params={nn.PARTITION_NAME: "layers"},
  )
  return scanned(
    tuple(block(kind, True) for kind in kinds[period]), tuple(has_experts[period]), name="repeats"
  )


def balancing_bias(
  module: nn.Module, num_layers: int, num_experts: int, state: Sequence[str]
) -> Float[Array, "Lm E"] | None:
  """Returns the bias that loss-free balancing adds to the experts' scores, for each layer.

  It is a variable of `module` in the collection "router_state", as is what the rule that moves it
  has to remember (`routing/balancing.py`). All start at 0.

  Args:
    module: The module that owns the variables. The call must come from one of its compact methods.
    num_layers: Number of layers with experts, Lm.
    num_experts: Number of experts E.
    state: Names of the variables, "bias" and the rule's memory; without any, the result is None.
  """
  variables = {
    name: module.variable(
      "router_state", name, jnp.zeros, (num_layers, num_experts), jnp.float32
    ).value
    for name in state
  }
  return variables.get("bias")


def layer_salts(seed: int | Int[Array, ""], num_layers: int) -> UInt32[Array, "Lm"]:
  """Returns the `RoutingContext.salt` of each layer with experts, a hash of the seed and its index.

  Args:
    seed: Seed of the run.
    num_layers: Number of layers with experts, Lm, which are the only ones that are counted.
  """
  return mix(jnp.arange(num_layers), seed)


def outside_routing(
  model: nn.Module, stored: RoutingPlan | None = None, micro: Microbatch | None = None
) -> LayerRouting:
  """Returns what the routers of all layers with experts receive from outside their layers.

  It must be called in a compact method of the model, which then owns the balancing bias. Layers
  with experts are numbered through the whole model, so that no two of them have the same salt,
  whether or not they are scanned.

  Args:
    model: A model with the fields `has_experts`, `num_experts`, `balancing_state` and `seed`.
    stored: Plans to follow, with a leading axis over the layers with experts.
    micro: The place of a microbatch in its batch, which has the f of the whole batch.
  """
  layers = sum(model.has_experts)
  return LayerRouting(
    balancing_bias(model, layers, model.num_experts, model.balancing_state),
    stored,
    shares=micro.shares if micro else {},
    salt=layer_salts(model.seed, layers),
  )


def rows(routing: LayerRouting, index: int | slice) -> LayerRouting:
  """Returns the entries of `routing` for some of the layers with experts."""
  return jax.tree.map(lambda leaf: leaf[index], routing)
