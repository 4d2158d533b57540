"""The Mixture-of-Experts layer, which routes tokens, runs the experts and reports metrics."""

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

from moe_jax.dispatch import FEW_TOKENS, CapacityOptions, drop_overflow, few_tokens, fit_buffers
from moe_jax.errors import ConfigError
from moe_jax.experts import Experts
from moe_jax.layers import zero_experts
from moe_jax.layers.aux import Aux, LayerContext, LayerRouting, measured
from moe_jax.layers.ffn import experts
from moe_jax.layers.gate import (
  NETWORKS,
  GateOptions,
  adjust,
  expert_scale,
  learned,
  residual,
  scale_gates,
)
from moe_jax.layers.init import projection
from moe_jax.layers.moe_losses import LossOptions, RouterFacts, auxiliary_losses, global_shares
from moe_jax.layers.norms import RmsNorm
from moe_jax.layers.zero_experts import ZeroOptions
from moe_jax.options import INT32, ROWS, Bounds, Options, option
from moe_jax.routing import RoutingContext, RoutingPlan, group_axes, metrics, noise
from moe_jax.routing.losses import SCORES
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
    """Returns S for a batch of `batch` rows of `length` tokens, which is at most batch * length.

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
  """The sum of gate * expert(x) over each token's experts, plus the output of shared experts.

  Tokens are routed in groups of S tokens that compete for the same slots. The router sees its own
  float32 copy of the input, jittered in training if the options ask for it; the experts see the
  input itself.

  Attributes:
    num_experts: Number of experts E that have an FFN.
    d_ff: Hidden width F of one expert.
    activation: A key of `ACTIVATIONS`.
    router: (logits [S, N], context) -> plan over N experts; the `route` of a `Router` with its
      options bound.
    dispatcher: (plan, x, experts, capacity, platform) -> y; a function of `DISPATCHERS` with its
      options bound.
    platform: Platform of the devices that will run the layer: "cpu", "gpu" or "tpu".
    gate: Options of the router's input and of the gates.
    groups: Options that say which tokens are routed together.
    capacity: Options that say how many slots an expert has.
    buffer_factor: The option of that name of the dispatcher, which decides what is dropped beyond
      the capacity. None means that nothing is.
    zero: Options that say how many experts Z have no FFN. The router chooses from N = E + Z, and
      dispatchers get the E with an FFN only.
    losses: Options that say which auxiliary losses are reported, and what they count.
    facts: What these losses must know about the router.
    observe: (logits [G, S, N], bias [N], valid [G, S]) -> what the rule of loss-free balancing must
      know about them, which is added to `Aux.sums` in training. None means nothing.
    learned: Fields of `RoutingContext` that the layer learns for the router; see `Router.learned`.
    router_groups: Number of groups of experts, for a hierarchical router.
    shared: Makes the dense FFN that every token visits; None means that there is none.
    shared_gate: Whether the output of `shared` is multiplied by sigmoid(w x) (Qwen1.5-MoE).
    latent_width: Width W in which experts compute, y = W_up sum_i g_i E_i(W_down x) (LatentMoE).
      The router and shared experts see x itself. 0 means that experts compute in the width of x.
    ffn_bias: A key of `FFN_BIASES`: what a vector of each expert does to its hidden units.
    expert_bias: Whether each product with a matrix of an expert has an additive bias (gpt-oss).
    output_scale: Factor on the initial output projections.
    dtype: Dtype of the activations. Parameters and gates are float32, and the router computes in
      `gate.router_dtype`.
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
  buffer_factor: float | None = None
  zero: ZeroOptions = ZeroOptions()
  losses: LossOptions = LossOptions()
  facts: RouterFacts = RouterFacts()
  observe: Callable[..., dict[str, Array]] | None = None
  learned: tuple[str, ...] = ()
  router_groups: int = 1
  shared: Callable[..., nn.Module] | None = None
  shared_gate: bool = False
  latent_width: int = 0
  ffn_bias: str = "none"
  expert_bias: bool = False
  output_scale: float = 1.0
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B L D"],
    context: LayerContext | None = None,
    routing: LayerRouting | None = None,
  ) -> tuple[Float[Array, "B L D"], Aux]:
    """Returns the output of the layer, and its losses and metrics.

    Args:
      x: Activations of B rows of L tokens.
      context: What the layer must know about the tokens. None means that each row is one document
        without padding, at evaluation (`LayerContext.of_rows`).
      routing: The bias, the stored plan, the loss terms and the salt of this layer. None means that
        there are none of these.
    """
    if context is None:
      context = LayerContext.of_rows(x.shape[0], x.shape[1])
    # A token that is routed by itself competes with no other token for slots.
    size = 1 if context.dropless else self.groups.tokens(*x.shape[:2])

    def grouped(t):
      return constrain(
        t.reshape(-1, size, *t.shape[2:]), "group", *(None,) * (t.ndim - 1)
      )  # [G, S, ...]

    groups, routing = grouped(x), routing or LayerRouting()
    place = _place(context, size, x.shape[1])
    before = None if context.before is None else grouped(context.before)
    logits, fields = self._logits(groups, context.train, place, before)
    weights = experts(
      self,
      self.num_experts,
      self.latent_width or x.shape[-1],
      self.d_ff,
      self.activation,
      self.ffn_bias,
      1.0 if self.latent_width else self.output_scale,
      self.expert_bias,
    )
    latent = self._latent(x.shape[-1])
    scale = expert_scale(self, self.routed_experts, self.gate)
    constants = zero_experts.constants(self, self.zero, x.shape[-1])
    if self.is_initializing():
      # All parameters exist by now except those of the shared experts. Routing and dispatch create
      # none, so initialisation does not trace them.
      if self.shared is not None:
        self._shared(self.shared, x, context)
      return x, Aux()
    keys = None
    if context.train and self.has_rng("router"):
      keys = noise.own(
        functools.partial(jax.random.split, self.make_rng("router")), groups.shape[0], place
      )
    valid = grouped(context.segment_ids > 0)
    router_context = RoutingContext(
      key=keys,
      valid=valid,
      token_ids=None if context.token_ids is None else grouped(context.token_ids),
      group=_group_numbers(context, groups.shape[0]),
      bias=routing.bias,
      salt=routing.salt,
      train=context.train,
      **fields,
    )
    plan = self._plan(logits, router_context, routing.stored)
    capacity, dispatcher, buffer_factor = None, self.dispatcher, self.buffer_factor
    if not context.dropless:
      capacity = self.capacity.slots(size, self.num_experts, plan.expert.shape[-1], context.train)
    elif groups.shape[0] <= FEW_TOKENS:
      dispatcher, buffer_factor = few_tokens, None
    elif buffer_factor is not None:
      dispatcher, buffer_factor = functools.partial(dispatcher, buffer_factor=None), None
    # Only the dispatcher sees the scaled gates; losses and metrics see those of the router.
    scaled = scale_gates(plan, self.gate.routed_scale, scale)
    if self.gate.gate_on == "input":
      dispatcher = functools.partial(_gate_inputs, dispatcher)
    # The part of the plan that costs work. It is the whole plan if all experts have an FFN.
    busy = self._ffn_part(scaled)
    if latent is None:
      y = dispatcher(busy, groups, weights, capacity, self.platform)
    else:
      down, up = latent
      narrow = groups @ down.astype(groups.dtype)
      y = dispatcher(busy, narrow, weights, capacity, self.platform)
      y = y @ up.astype(groups.dtype)
    if self.zero.count:
      y += zero_experts.outputs(scaled, groups, self.zero, constants)
    y = y.reshape(x.shape)
    if self.shared is not None:
      y += self._shared(self.shared, x, context)
    kept = fit_buffers(
      jax.vmap(lambda p: drop_overflow(p, capacity))(self._ffn_part(plan)), buffer_factor
    )
    if self.zero.count:
      kept = zero_experts.with_kept(plan, kept)
    tokens = None if context.micro is None else context.micro.tokens
    sums = metrics.sums(logits, plan, kept, valid)
    if self.zero.count:
      sums |= zero_experts.sums(plan, self.num_experts)
    if self.observe is not None and context.train and routing.bias is not None:
      sums |= self.observe(logits, routing.bias, valid)
    matrix = nn.meta.unbox(self.get_variable("params", "router"))
    facts = dataclasses.replace(self.facts, eta=self.zero.eta(self.num_experts), matrix=matrix)
    aux = measured(
      sums,
      losses=auxiliary_losses(
        self.losses, facts, logits, plan, router_context, tokens, routing.shares
      ),
      shares=global_shares(self.losses, facts, logits, plan, router_context, tokens),
    )
    if self.gate.gate_residual:
      passed_on = logits.reshape(*x.shape[:2], -1)
      aux = aux.replace(logits=constrain(passed_on, "batch", "length", None))
    if context.return_routing:
      aux.metrics["top1_expert"] = jax.vmap(lambda p: choices(p, size, 1)[0])(plan).reshape(
        x.shape[:2]
      )
      aux.metrics["plan"] = plan
      probabilities = SCORES[self.losses.balance_scores](logits)
      aux.metrics["probabilities"] = probabilities.reshape(*x.shape[:2], -1)
    return constrain(y, "batch", "length", "act_embed"), aux

  @property
  def routed_experts(self) -> int:
    """The number N = E + Z of experts that the router chooses from."""
    return self.num_experts + self.zero.count

  def _latent(self, width: int) -> tuple[Float[Array, "D W"], Float[Array, "W D"]] | None:
    """Returns the matrices into and out of the experts' width, or None without `latent_width`."""
    inner = self.latent_width
    if not inner:
      return None
    down = projection(self, "latent_down", (width, inner), ("embed", None), fan_in=width)
    scale = self.output_scale
    up = projection(self, "latent_up", (inner, width), (None, "embed"), fan_in=inner, scale=scale)
    return down, up

  def _ffn_part(self, plan: RoutingPlan) -> RoutingPlan:
    """Returns the assignments to experts with an FFN, in a plan over these alone."""
    return zero_experts.ffn_part(plan, self.num_experts) if self.zero.count else plan

  def _logits(
    self,
    x: Float[Array, "G S D"],
    train: bool,
    place: noise.Place | None,
    before: Float[Array, "G S N"] | None,
  ) -> tuple[Float[Array, "G S N"], dict[str, Array]]:
    """Returns the router's logits and the learned fields of its context, all as float32.

    They are computed in `router_dtype`, which is float32 except in an ablation.

    Args:
      x: The layer's input.
      train: Whether jitter is on.
      place: The place of the microbatch in its batch, which decides the random numbers.
      before: Logits of the layer with experts before, for `gate_residual`.
    """
    x = x.astype(jnp.float32)
    if self.gate.router_norm == "rms":
      x = RmsNorm(name="router_norm")(x)
    jittered = bool(self.gate.jitter and train)
    if jittered and self.gate.jitter_on == "input":
      x = noise.jitter(self.make_rng("router"), x, self.gate.jitter, place)
    x = x.astype(jnp.dtype(self.gate.router_dtype))
    logits = NETWORKS[self.gate.gate_network](
      self, x, self.routed_experts, self.gate.router_init_scale
    ).astype(jnp.float32)
    if self.gate.gate_residual:
      logits = residual(self, logits, before)
    logits = adjust(self, logits, self.gate)
    if jittered and self.gate.jitter_on == "logits":
      logits = noise.jitter(self.make_rng("router"), logits, self.gate.jitter, place)
    fields = learned(
      self, x, self.learned, self.routed_experts, self.router_groups, self.gate.router_init_scale
    )
    return logits, {name: field.astype(jnp.float32) for name, field in fields.items()}

  def _plan(
    self, logits: Float[Array, "G S N"], context: RoutingContext, stored: RoutingPlan | None
  ) -> RoutingPlan:
    """Returns the plan of all groups, from the router or from `stored`."""
    if stored is None:
      return jax.vmap(self.router, in_axes=(0, group_axes(context)))(logits, context)

    def follow(stored, logits, context):
      return replay(stored, logits, context, gate=self.gate.replay_gate)

    return jax.vmap(follow, in_axes=(0, 0, group_axes(context)))(stored, logits, context)

  def _shared(
    self, make: Callable[..., nn.Module], x: Float[Array, "B L D"], context: LayerContext
  ) -> Float[Array, "B L D"]:
    """Returns the output of the shared experts, which `make` makes, times their gate if any."""
    y = make(name="shared")(x, context)[0]
    if not self.shared_gate:
      return y
    weight = projection(
      self, "shared_gate", (x.shape[-1], 1), ("embed", None), fan_in=x.shape[-1], dtype=self.dtype
    )
    return jax.nn.sigmoid(x @ weight) * y


def _gate_inputs(
  dispatcher: Callable[..., Array],
  plan: RoutingPlan,
  x: Float[Array, "G S D"],
  weights: Experts,
  capacity: int | None,
  platform: str,
) -> Float[Array, "G S D"]:
  """Returns the sum of expert(gate * x) over each token's experts, in place of gate * expert(x).

  The dispatcher gets each assignment as a token of its own, which is multiplied already and has the
  gate 1. The order of assignments stays, and with it what a capacity drops.

  Args:
    dispatcher: The function that the other arguments are for.
    plan: The plan of each group, with the gates to multiply by.
    x: The tokens of each group.
    weights: The experts.
    capacity: Slots per expert.
    platform: Platform of the devices.
  """

  def gated(x, plan):
    return (plan.gate[:, None] * x[plan.token].astype(jnp.float32)).astype(x.dtype)  # [A, D]

  def added(y, token):
    return jnp.zeros(x.shape[1:], y.dtype).at[token].add(y)

  own = jnp.broadcast_to(jnp.arange(plan.token.shape[-1]), plan.token.shape)
  ones = jnp.where(plan.expert < plan.num_experts, 1.0, 0.0)
  alone = dataclasses.replace(plan, token=own, gate=ones)
  rows = constrain(jax.vmap(gated)(x, plan), "group", None, None)
  y = dispatcher(alone, rows, weights, capacity, platform)
  return constrain(jax.vmap(added)(y, plan.token), "group", None, None)


def _group_numbers(context: LayerContext, count: int) -> Int[Array, "G"]:
  """Returns a number for each routing group of a call, in the order of the groups.

  Tokens of a row that is read by several calls get different numbers, so that a router that draws
  random experts draws different ones.
  """
  numbers = jnp.arange(count)
  return numbers if context.cached is None else numbers + context.cached.index * count


def _place(context: LayerContext, size: int, length: int) -> noise.Place | None:
  """Returns the place of a microbatch's routing groups in its batch; None without microbatches.

  Args:
    context: The context of the layer.
    size: Tokens per group.
    length: Tokens per row.
  """
  if context.micro is None:
    return None
  # `Place` counts one group per row where groups do not lie within rows.
  groups_per_row = 1 if length % size else length // size
  return noise.Place(context.micro.index, context.micro.count, groups_per_row)


def choices(plan: RoutingPlan, num_tokens: int, count: int) -> Int[Array, "N S"]:
  """Returns, for one group, the experts with the largest gates of each token, before capacity.

  Args:
    plan: The plan of the group.
    num_tokens: The number of tokens S.
    count: The number N of choices, at most E. The first one has the largest gate. A choice that a
      token does not have is `num_experts`.
  """
  # Assignments that name no expert are out of bounds here and are dropped by the scatter.
  gates = (
    jnp.full((num_tokens, plan.num_experts), -1.0)
    .at[plan.token, plan.expert]
    .max(plan.gate, mode="drop")
  )
  # Equal gates are in the order of their experts.
  largest, experts = jax.lax.top_k(gates, count)
  return jnp.where(largest < 0, plan.num_experts, experts).astype(jnp.int32).T
