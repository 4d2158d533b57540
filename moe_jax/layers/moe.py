"""The Mixture-of-Experts layer: route, dispatch, report."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from moe_jax.dispatch import drop_overflow, expert_capacity
from moe_jax.errors import ConfigError
from moe_jax.experts import Experts, is_gated
from moe_jax.layers.aux import Aux, LayerContext
from moe_jax.layers.init import projection
from moe_jax.routing import RoutingContext, RoutingPlan, group_axes, losses, metrics, noise
from moe_jax.sharding import constrain

ROUTER_SCALE = 0.1  # of the initial router, see layers/init.py


class MoeLayer(nn.Module):
  """y = sum over the chosen experts of gate * expert(x), plus what shared experts make of x.

  Tokens are routed in groups of S that compete for the same slots. The router sees its own float32 copy of the input,
  jittered in training; the experts see the input itself.

  Attributes:
    num_experts: E.
    d_ff: F, hidden width of one expert.
    activation: a key of `ACTIVATIONS`.
    router: (logits [S, E], context) -> plan; a function of `ROUTERS` with its options bound.
    dispatcher: (plan, x, experts, capacity, platform) -> y; a function of `DISPATCHERS` with its options bound.
    platform: of the devices that will run this: "cpu", "gpu", "tpu".
    shared: makes the dense FFN that every token visits; None: there is none.
    group_size: S; 0: one sequence. All tokens are one group where there are fewer.
    capacity_factor: see `expert_capacity`, also for the next two; None: dropless.
    capacity_basis: "tokens" or "assignments".
    min_capacity: slots.
    eval_capacity_factor: takes the place of capacity_factor where train is False, unless None.
    jitter: the router's input is multiplied by U[1 - jitter, 1 + jitter] in training.
    loss_names: which of `LOSSES` to report.
    balance_counts: "top_1" or "all", see `losses.balance_terms`.
    balance_over: "group" or "global": over what f and P are averaged before they are multiplied.
    output_scale: factor on the initial output projections.
    dtype: of the activations; parameters, router and gates are float32.
  """

  num_experts: int
  d_ff: int
  activation: str
  router: Callable[..., RoutingPlan]
  dispatcher: Callable[..., Array]
  platform: str
  shared: Callable[..., nn.Module] | None = None
  group_size: int = 0
  capacity_factor: float | None = None
  capacity_basis: str = "tokens"
  min_capacity: int = 1
  eval_capacity_factor: float | None = None
  jitter: float = 0.0
  loss_names: tuple[str, ...] = ()
  balance_counts: str = "top_1"
  balance_over: str = "group"
  output_scale: float = 1.0
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "B L D"], context: LayerContext,
               bias: Float[Array, "E"] | None = None) -> tuple[Float[Array, "B L D"], Aux]:
    size = group_size(self.group_size, *x.shape[:2])
    grouped = lambda t: constrain(t.reshape(-1, size, *t.shape[2:]), "group", *(None,) * (t.ndim - 1))  # [G, S, ...]
    groups, valid = grouped(x), grouped(context.segment_ids > 0)
    logits = self._logits(groups, context.train)
    noisy = context.train and self.has_rng("router")
    keys = jax.random.split(self.make_rng("router"), groups.shape[0]) if noisy else None
    routing = RoutingContext(key=keys, valid=valid, token_ids=grouped(context.token_ids), bias=bias,
                             train=context.train)
    plan = jax.vmap(self.router, in_axes=(0, group_axes(routing)))(logits, routing)
    capacity = self._capacity(size, plan.expert.shape[-1], context.train)
    y = self.dispatcher(plan, groups, self._experts(x.shape[-1]), capacity, self.platform).reshape(x.shape)
    if self.shared is not None:
      y += self.shared(name="shared")(x, context)[0]
    kept = jax.vmap(lambda p: drop_overflow(p, capacity))(plan)
    aux = Aux({name: LOSSES[name](self, logits, plan, valid) for name in self.loss_names},
              _metrics(logits, plan, kept, valid))
    if context.return_routing:
      aux.metrics["top1_expert"] = jax.vmap(lambda p: first_choice(p, size))(plan).reshape(x.shape[:2])
    return constrain(y, "batch", "length", "act_embed"), aux

  def _logits(self, x: Float[Array, "G S D"], train: bool) -> Float[Array, "G S E"]:
    """Router logits, in float32 to the last bit of the hardware's ability, whatever the dtype of the model."""
    x = x.astype(jnp.float32)
    if self.jitter and train:
      x = noise.jitter(self.make_rng("router"), x, self.jitter)
    weight = projection(self, "router", (x.shape[-1], self.num_experts), ("embed", "router"), fan_in=x.shape[-1],
                        scale=ROUTER_SCALE)
    return jnp.einsum("gsd,de->gse", x, weight, precision=jax.lax.Precision.HIGHEST)

  def _experts(self, width: int) -> Experts:
    """The weights [E, D, F], [E, F, D]; float32, cast to the dtype of the rows where they are used."""
    into = lambda name: projection(self, name, (self.num_experts, width, self.d_ff), ("expert", "embed", "mlp"),
                                   fan_in=width)
    down = projection(self, "down", (self.num_experts, self.d_ff, width), ("expert", "mlp", "embed"),
                      fan_in=self.d_ff, scale=self.output_scale)
    return Experts(up=into("up"), down=down, gate=into("gate") if is_gated(self.activation) else None,
                   activation=self.activation)

  def _capacity(self, tokens: int, assignments: int, train: bool) -> int | None:
    evaluates = not train and self.eval_capacity_factor is not None
    return expert_capacity(tokens, self.num_experts, assignments,
                           self.eval_capacity_factor if evaluates else self.capacity_factor, self.capacity_basis,
                           self.min_capacity)


def group_size(wanted: int, batch: int, length: int) -> int:
  """S for a batch: `wanted`, or one sequence if that is 0; all tokens if there are fewer (sampling, a probe).

  Raises:
    ConfigError: S does not divide the number of tokens.
  """
  size = min(wanted or length, batch * length)
  if batch * length % size:
    raise ConfigError("model.moe.group_size", wanted, f"must divide the {batch} x {length} tokens of a batch, or be 0 "
                      "for groups of one sequence")
  return size


def _balance(layer: MoeLayer, logits, plan, valid):
  f, p = jax.vmap(lambda l, q, v: losses.balance_terms(l, q, v, layer.balance_counts))(logits, plan, valid)
  if layer.balance_over == "global":
    return losses.balance(losses.over_groups(f, valid), losses.over_groups(p, valid))
  return losses.over_groups(jax.vmap(losses.balance)(f, p), valid)


def _load(layer: MoeLayer, logits, plan, valid):
  """With V-MoE's sigma of 1/E, about the logits as they are: no noise is added to them."""
  k = max(plan.expert.shape[-1] // logits.shape[1], 1)
  one = lambda l, v: losses.load(l, l, v, k, 1.0 / layer.num_experts)
  return losses.over_groups(jax.vmap(one)(logits, valid), valid)


# name -> f(layer, logits [G, S, E], plan, valid [G, S]) -> scalar, unweighted.
LOSSES = {
    "balance": _balance,
    "z": lambda layer, logits, plan, valid: losses.over_groups(jax.vmap(losses.z)(logits, valid), valid),
    "importance": lambda layer, logits, plan, valid: losses.over_groups(
        jax.vmap(losses.importance)(logits, valid), valid),
    "load": _load,
}


def _metrics(logits: Float[Array, "G S E"], plan: RoutingPlan, kept: RoutingPlan,
             valid: Bool[Array, "G S"]) -> dict[str, Array]:
  load = metrics.load(plan)
  values = {"load": load, "drop_rate": metrics.drop_rate(plan, kept), "max_violation": metrics.max_violation(load),
            "dropped_tokens": metrics.dropped_tokens(kept, valid), "entropy": metrics.entropy(logits, valid),
            "logit_max": metrics.logit_max(logits, valid)}
  return jax.tree.map(jax.lax.stop_gradient, values)


def first_choice(plan: RoutingPlan, num_tokens: int) -> Int[Array, "S"]:
  """Each token's expert of the largest gate, before capacity; num_experts for those that have none. One group."""
  gates = jnp.full((num_tokens, plan.num_experts), -1.0).at[plan.token, plan.expert].max(plan.gate, mode="drop")
  return jnp.where(jnp.max(gates, axis=-1) < 0, plan.num_experts, jnp.argmax(gates, axis=-1)).astype(jnp.int32)
