"""The Mixture-of-Experts layer: route, dispatch, report."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe_jax.dispatch import CapacityOptions, drop_overflow
from moe_jax.errors import ConfigError
from moe_jax.layers.aux import Aux, LayerContext, LayerRouting, measured
from moe_jax.layers.ffn import experts
from moe_jax.layers.gate import NETWORKS, GateOptions, learned
from moe_jax.layers.init import projection
from moe_jax.layers.moe_losses import LossOptions, RouterFacts, auxiliary_losses, global_shares
from moe_jax.options import INT32, ROWS, Bounds, Options, option
from moe_jax.routing import RoutingContext, RoutingPlan, group_axes, metrics, noise
from moe_jax.routing.replay import replay
from moe_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class GroupOptions(Options):
  """The part of the section `model.moe` that says which tokens compete for the same slots."""

  group_size: Annotated[int, Bounds(0, INT32, "tokens are counted in int32")] = option(
    0,
    "S, tokens that are routed together; divides the tokens of a batch; 0 means those of "
    "group_rows sequences.",
  )
  group_rows: Annotated[int, ROWS] = option(
    1, "Sequences that are routed together where group_size is 0; divides a microbatch."
  )

  def tokens(self, batch: int, length: int) -> int:
    """Returns S for a batch of `batch` rows of `length` tokens: all of them if there are fewer.

    Raises:
      ConfigError: S does not divide the number of tokens.
    """
    wanted = self.group_size or self.group_rows * length
    size = min(wanted, batch * length)
    if batch * length % size:
      raise ConfigError(
        "model.moe.group_size",
        wanted,
        f"must divide the {batch} x {length} tokens of a batch, or be 0 "
        "for groups of group_rows whole sequences, which divide their number",
      )
    return size


class MoeLayer(nn.Module):
  """y = sum over the chosen experts of gate * expert(x), plus the output of shared experts.

  Tokens are routed in groups of S that compete for the same slots. The router sees its own float32
  copy of the input, jittered in training; the experts see the input itself.

  Attributes:
    num_experts: E.
    d_ff: F, hidden width of one expert.
    activation: A key of `ACTIVATIONS`.
    router: (logits [S, E], context) -> plan; the `route` of a `Router` with its options bound.
    dispatcher: (plan, x, experts, capacity, platform) -> y; a function of `DISPATCHERS` with its
      options bound.
    platform: Platform of the devices that will run the layer: "cpu", "gpu" or "tpu".
    gate: What the router sees, and what its gates become.
    groups: Which tokens are routed together.
    capacity: How many slots an expert has.
    losses: Which auxiliary losses are reported, and what they count.
    facts: What these losses must know about the router.
    learned: Fields of `RoutingContext` that the layer learns for the router; see `Router.learned`.
    router_groups: N, groups of experts, where the router is hierarchical.
    shared: Makes the dense FFN that every token visits; None means that there is none.
    shared_gate: Whether its output is multiplied by sigmoid(w x) (Qwen1.5-MoE).
    ffn_bias: A key of `FFN_BIASES`: what a vector of each expert does to its hidden units.
    output_scale: Factor on the initial output projections.
    dtype: Dtype of the activations; parameters, router and gates are float32.
  """

  num_experts: int
  d_ff: int
  activation: str
  router: Callable[..., RoutingPlan]
  dispatcher: Callable[..., Array]
  platform: str
  gate: GateOptions = GateOptions()
  groups: GroupOptions = GroupOptions()
  capacity: CapacityOptions = CapacityOptions()
  losses: LossOptions = LossOptions()
  facts: RouterFacts = RouterFacts()
  learned: tuple[str, ...] = ()
  router_groups: int = 1
  shared: Callable[..., nn.Module] | None = None
  shared_gate: bool = False
  ffn_bias: str = "none"
  output_scale: float = 1.0
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "B L D"], context: LayerContext, routing: LayerRouting | None = None
  ) -> tuple[Float[Array, "B L D"], Aux]:
    size = self.groups.tokens(*x.shape[:2])

    def grouped(t):
      return constrain(
        t.reshape(-1, size, *t.shape[2:]), "group", *(None,) * (t.ndim - 1)
      )  # [G, S, ...]

    groups, routing = grouped(x), routing or LayerRouting()
    place = _place(context, size, x.shape[1])
    logits, fields = self._logits(groups, context.train, place)
    weights = experts(
      self,
      self.num_experts,
      x.shape[-1],
      self.d_ff,
      self.activation,
      self.ffn_bias,
      self.output_scale,
    )
    if self.is_initializing():
      # Only the weights are asked for, so that routing and dispatch would be traced for nothing.
      if self.shared is not None:
        self._shared(x, context)
      return x, Aux()
    keys = None
    if context.train and self.has_rng("router"):
      keys = noise.own(
        functools.partial(jax.random.split, self.make_rng("router")), groups.shape[0], place
      )
    seen = RoutingContext(
      key=keys,
      valid=grouped(context.segment_ids > 0),
      token_ids=grouped(context.token_ids),
      group=jnp.arange(groups.shape[0]),
      bias=routing.bias,
      salt=routing.salt,
      train=context.train,
      **fields,
    )
    plan = self._plan(logits, seen, routing.stored)
    capacity = self.capacity.slots(size, self.num_experts, plan.expert.shape[-1], context.train)
    scaled = plan.replace(gate=self.gate.routed_scale * plan.gate)
    y = self.dispatcher(scaled, groups, weights, capacity, self.platform).reshape(x.shape)
    if self.shared is not None:
      y += self._shared(x, context)
    kept = jax.vmap(lambda p: drop_overflow(p, capacity))(plan)
    tokens = None if context.micro is None else context.micro.tokens
    aux = measured(
      metrics.sums(logits, plan, kept, seen.valid),
      losses=auxiliary_losses(self.losses, self.facts, logits, plan, seen, tokens, routing.shares),
      shares=global_shares(self.losses, self.facts, logits, plan, seen, tokens),
    )
    if context.return_routing:
      aux.metrics["top1_expert"] = jax.vmap(lambda p: first_choice(p, size))(plan).reshape(
        x.shape[:2]
      )
      aux.metrics["plan"] = plan
    return constrain(y, "batch", "length", "act_embed"), aux

  def _logits(
    self, x: Float[Array, "G S D"], train: bool, place: noise.Place | None
  ) -> tuple[Float[Array, "G S E"], dict[str, Array]]:
    """Router logits and the learned fields of its context: float32 numbers, made in float32 or else
    in router_dtype."""
    x = x.astype(jnp.float32)
    shaken = bool(self.gate.jitter and train)
    if shaken and self.gate.jitter_on == "input":
      x = noise.jitter(self.make_rng("router"), x, self.gate.jitter, place)
    x = x.astype(jnp.dtype(self.gate.router_dtype))
    logits = NETWORKS[self.gate.gate_network](
      self, x, self.num_experts, self.gate.router_init_scale
    ).astype(jnp.float32)
    if shaken and self.gate.jitter_on == "logits":
      logits = noise.jitter(self.make_rng("router"), logits, self.gate.jitter, place)
    fields = learned(
      self, x, self.learned, self.num_experts, self.router_groups, self.gate.router_init_scale
    )
    return logits, {name: field.astype(jnp.float32) for name, field in fields.items()}

  def _plan(
    self, logits: Float[Array, "G S E"], context: RoutingContext, stored: RoutingPlan | None
  ) -> RoutingPlan:
    if stored is None:
      return jax.vmap(self.router, in_axes=(0, group_axes(context)))(logits, context)

    def follow(stored, logits, context):
      return replay(stored, logits, context, gate=self.gate.replay_gate)

    return jax.vmap(follow, in_axes=(0, 0, group_axes(context)))(stored, logits, context)

  def _shared(self, x: Float[Array, "B L D"], context: LayerContext) -> Float[Array, "B L D"]:
    y = self.shared(name="shared")(x, context)[0]
    if not self.shared_gate:
      return y
    weight = projection(
      self, "shared_gate", (x.shape[-1], 1), ("embed", None), fan_in=x.shape[-1], dtype=self.dtype
    )
    return jax.nn.sigmoid(x @ weight) * y


def _place(context: LayerContext, size: int, length: int) -> noise.Place | None:
  """Where a microbatch's groups of `size` tokens lie among those of the batch, whose rows have
  `length`."""
  if context.micro is None:
    return None
  return noise.Place(
    context.micro.index, context.micro.count, 1 if length % size else length // size
  )


def first_choice(plan: RoutingPlan, num_tokens: int) -> Int[Array, "S"]:
  """Each token's expert of the largest gate, before capacity; num_experts for those that have none.
  One group."""
  gates = (
    jnp.full((num_tokens, plan.num_experts), -1.0)
    .at[plan.token, plan.expert]
    .max(plan.gate, mode="drop")
  )
  return jnp.where(
    jnp.max(gates, axis=-1) < 0, plan.num_experts, jnp.argmax(gates, axis=-1)
  ).astype(jnp.int32)
