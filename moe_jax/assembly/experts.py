"""Builds the layers with experts of a config from `config.model.moe`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from moe_jax.assembly.bind import bind
from moe_jax.assembly.sublayers import kind, layout, own_models
from moe_jax.dispatch import DISPATCHERS, CapacityOptions
from moe_jax.errors import ConfigError
from moe_jax.layers import (
  GateOptions,
  GroupOptions,
  LossOptions,
  MoeLayer,
  RouterFacts,
  SoftMoeLayer,
  ZeroOptions,
  load_without_noise,
)
from moe_jax.layers.zero_experts import WITHOUT_FFN
from moe_jax.models import moe_layers
from moe_jax.options import Config
from moe_jax.routing import ROUTERS, Leak, RoutingContext, RoutingPlan, balancing
from moe_jax.routing.balancing import BalancingOptions


def moe_layer(
  m: Config, dense: functools.partial, platform: str, by_hash: bool = False
) -> functools.partial:
  """Returns a factory for a layer with experts, which takes the place of the dense FFN.

  Args:
    m: The section `model` of the config.
    dense: A factory for `DenseFfn`. It also makes the shared experts, with another width and
      activation.
    platform: The platform of the devices that will run the layer.
    by_hash: Whether it is one of the layers of `hash_layers`.
  """
  e = m.moe
  check_zero_experts(e)
  activation = e.activation or m.activation
  shared = functools.partial(dense, d_ff=e.num_shared_experts * e.d_ff, activation=activation)
  common = dict(
    num_experts=e.num_experts,
    d_ff=e.d_ff,
    activation=activation,
    shared=shared if e.num_shared_experts else None,
    ffn_bias=m.ffn_bias,
    expert_bias=e.expert_bias,
    groups=GroupOptions.of(e),
    output_scale=dense.keywords["output_scale"],
    dtype=dense.keywords["dtype"],
  )
  if e.soft_slots:
    return functools.partial(SoftMoeLayer, slots=e.soft_slots, **common)
  router = router_of(e)
  dispatcher = bind(DISPATCHERS, e.dispatcher, "model.moe.dispatcher")
  return functools.partial(
    MoeLayer,
    router=_hash_router(router) if by_hash else router,
    dispatcher=dispatcher,
    buffer_factor=option(dispatcher, "buffer_factor"),
    platform=platform,
    learned=ROUTERS[e.router["name"]].learned,
    router_groups=option(router, "groups", 1),
    gate=GateOptions.of(e),
    capacity=capacity_options(e, router),
    zero=ZeroOptions.of(e),
    losses=LossOptions.of(e),
    facts=_facts(e, router),
    observe=_observe(e, router),
    shared_gate=e.shared_gate,
    latent_width=e.latent_width,
    **common,
  )


def routed_experts(e: Config) -> int:
  """Returns the number of experts that the router of config.model.moe chooses from.

  It is num_experts plus the number of zero-computation experts.
  """
  return e.num_experts + ZeroOptions.of(e).count


def divided_experts(config: Config) -> int:
  """Returns the number of experts of a layer that a mesh may divide: those that have an FFN."""
  return config.model.moe.num_experts


def check_zero_experts(e: Config) -> None:
  """Raises ConfigError if config.model.moe has zero-computation experts that it cannot have."""
  zero = ZeroOptions.of(e)
  if not zero.count:
    return
  field = next(name for name in WITHOUT_FFN if getattr(zero, name))

  def refuse(reason: str) -> ConfigError:
    return ConfigError(f"model.moe.{field}", getattr(zero, field), reason)

  name = e.router["name"]
  if e.soft_slots:
    raise refuse(f"Soft MoE (soft_slots={e.soft_slots}) has none; must be 0, or set soft_slots=0")
  if ROUTERS[name].competes or option(router_of(e), "capacity_factor") is not None:
    raise refuse(
      f"tokens of the router {name} compete for slots, which an expert without an FFN does not "
      "have; must be 0, or use a router by which tokens choose, such as top_k"
    )
  for loss in ("device_loss", "communication_loss"):
    if e[loss]:
      raise refuse(
        f"is an expert on no device, and {loss}={e[loss]:g} counts those of devices; must be 0, or "
        f"set {loss}=0"
      )
  if zero.constant_experts and e.gate_on == "input":
    raise ConfigError(
      "model.moe.constant_experts",
      zero.constant_experts,
      "mix by a softmax of their input, which gate_on='input' would scale; must be 0, or set "
      "gate_on='output'",
    )


def encoder_model(m: Config) -> Config:
  """Returns config.model as an encoder's layers read it.

  The router's option `priority` has the value of encoder_priority, unless that is "".
  """
  if not m.moe.encoder_priority:
    return m
  copy: Config = ConfigDict(m.to_dict())
  copy.moe.router[copy.moe.router.name].priority = m.moe.encoder_priority
  return copy


def router_of(e: Config) -> functools.partial:
  """Returns the function of the router that `config.model.moe` names, with its options bound."""
  return bind(
    {name: router.route for name, router in ROUTERS.items()}, e.router, "model.moe.router"
  )


def _hash_router(router: functools.partial) -> functools.partial:
  """Returns the router of the layers of `hash_layers`, given that of the others, scored_top_k."""
  route = ROUTERS["hash_top_k"].route
  same = {name: option(router, name) for name in ("k", "score", "gate_norm", "norm_eps")}
  return functools.partial(route, **same)


def option(function: functools.partial, name: str, default: Any = None) -> Any:
  """Returns the value of an option of a router or a dispatcher, or `default` if there is none."""
  parameter = inspect.signature(function).parameters.get(name)
  return default if parameter is None else parameter.default


def capacity_options(e: Config, router: functools.partial) -> CapacityOptions:
  """Returns the capacity of a layer's experts.

  A router with a capacity factor of its own fills its slots exactly, so that nothing is dropped.
  """
  factor = option(router, "capacity_factor")
  return CapacityOptions.of(e) if factor is None else CapacityOptions(float(factor))


def _facts(e: Config, router: functools.partial) -> RouterFacts:
  """Returns what auxiliary losses must know about the router of config.model.moe."""
  # Any size is suitable for which the number of assignments per token is whole.
  size = 64 * routed_experts(e)
  k = _average(e, router) or max(round(trace_router(e, size).expert.shape[-1] / size), 1)
  smooth_load = ROUTERS[e.router["name"]].smooth_load
  load = (
    functools.partial(smooth_load, **router.keywords)
    if smooth_load
    else functools.partial(load_without_noise, k=k)
  )
  return RouterFacts(
    k=k, devices_a_token=option(router, "kept_groups", min(k, e.devices)), load=load
  )


def _average(e: Config, router: functools.partial) -> int:
  """Returns the mean experts per token of a router whose plans have room for more, or 0."""
  average = ROUTERS[e.router["name"]].average
  return option(router, average) if average else 0


def trace_router(e: Config, size: int) -> RoutingPlan:
  """Returns the abstract plan of one group of `size` tokens in training.

  Raises:
    ConfigError: If the router refuses its options.
  """
  router = router_of(e)
  learned = ROUTERS[e.router["name"]].learned
  return _traced(router.func, tuple(router.keywords.items()), learned, routed_experts(e), size)


# Many functions ask for the same plan, so it is cached.
@functools.lru_cache(maxsize=256)
def _traced(
  function: Callable,
  options: tuple[tuple[str, Any], ...],
  learned: tuple[str, ...],
  num_experts: int,
  size: int,
) -> RoutingPlan:
  """Returns `trace_router`'s plan; all arguments are hashable for the cache."""
  router = functools.partial(function, **dict(options))

  # Typed as Any, because `jax.eval_shape` takes shapes where the router takes arrays.
  def shape(*dims: int, dtype: Any = jnp.float32) -> Any:
    return jax.ShapeDtypeStruct(dims, dtype)

  fields = {
    "noise_std": (size, num_experts),
    "primary": (size, option(router, "groups", 1)),
    "primary_noise_std": (size, option(router, "groups", 1)),
    "threshold": (num_experts,),
  }
  learned_fields = {field: shape(*fields[field]) for field in learned}
  context = RoutingContext(token_ids=shape(size, dtype=jnp.int32), train=True, **learned_fields)
  return jax.eval_shape(router, shape(size, num_experts), context)


def has_experts(m: Config) -> tuple[bool, ...]:
  """Returns for each layer of config.model whether it has experts.

  The layers of an encoder come first. A Brainformer's layers are its sublayers.
  """
  if entries := layout(m):
    return tuple(kind(entry) == "moe" for entry in entries)
  return tuple(
    experts
    for layers in (encoder_layers(m), m.num_layers)
    for experts in (
      moe_layers(layers, m.moe.first, m.moe.every, m.moe.dense_layers)
      if m.moe.num_experts
      else (False,) * layers
    )
  )


def layer_kinds(m: Config) -> tuple[Hashable, ...]:
  """Returns for each layer of config.model its kind; layers of one kind are alike.

  It is whether the layer has experts, or "hash" if it is one of the first `hash_layers` of them. If
  `global_every` makes the attention of a decoder's layers differ, it is a pair of this and whether
  the layer's attention is global. Layers are in the order of `has_experts`. A Brainformer's kinds
  are its entries (`sublayers.layout`).
  """
  layers = has_experts(m)
  experts: tuple[Hashable, ...] = tuple(
    "hash" if has and sum(layers[:i]) < m.moe.hash_layers else has for i, has in enumerate(layers)
  )
  if not m.global_every or m.family != "decoder":
    return experts
  return tuple(zip(experts, global_layers(m), strict=True))


def global_layers(m: Config) -> tuple[bool, ...]:
  """Returns for each layer of a decoder whether its attention is global, by `global_every`."""
  every = m.global_every
  return tuple(bool(every) and (i + 1) % every == 0 for i in range(m.num_layers))


def names_of_layers_with_experts(config: Config) -> list[str]:
  """Returns a name for each layer with experts, in their order, such as "layer 3".

  An encoder and its decoder are numbered separately, as in "decoder layer 0".
  """
  layers, encoder = has_experts(config.model), encoder_layers(config.model)

  def name(i):
    return (
      f"layer {i}"
      if not encoder
      else f"encoder layer {i}"
      if i < encoder
      else f"decoder layer {i - encoder}"
    )

  return [name(i) for i, experts in enumerate(layers) if experts]


def layers_with_experts(m: Config) -> tuple[Config, ...]:
  """Returns config.model as each layer with experts reads it; those of an encoder come first."""
  models = own_models(m)
  layer_models = [models[entry] for entry in layout(m)]
  if not layer_models:
    layer_models = [encoder_model(m)] * encoder_layers(m) + [m] * m.num_layers
  return tuple(
    layer_model
    for layer_model, experts in zip(layer_models, has_experts(m), strict=True)
    if experts
  )


def encoder_layers(m: Config) -> int:
  """Returns the number of layers of config.model's encoder, or 0 if there is no encoder."""
  return (m.num_encoder_layers or m.num_layers) if m.family == "encoder_decoder" else 0


def looks_ahead(e: Config) -> Leak:
  """Returns whether the routing of config.model.moe looks ahead; see `routing.Leak`.

  Soft MoE mixes all tokens of a group, so it looks ahead.
  """
  return "yes" if e.soft_slots else ROUTERS[e.router["name"]].leak(**router_of(e).keywords)


def check_decoding(config: Config) -> None:
  """Raises ConfigError if the model cannot read its text token by token.

  That is the case if the routing of a token depends on other tokens even in evaluation and without
  a capacity, as in expert choice and Soft MoE.
  """
  for m in layers_with_experts(config.model):
    e = m.moe
    field, name = (
      ("soft_slots", e.soft_slots) if e.soft_slots else ("router.name", e.router["name"])
    )
    if e.soft_slots or ROUTERS[name].competes:
      raise ConfigError(
        f"model.moe.{field}",
        name,
        "lets later tokens decide what earlier ones get, so the model cannot read a text token by "
        "token; use one with another router",
      )


def group_tokens(e: Config, seq_len: int) -> int:
  """Returns S, the number of tokens that are routed together, for rows of `seq_len` tokens."""
  return e.group_size or e.group_rows * seq_len


def experts_a_token(m: Config, seq_len: int) -> float:
  """Returns A/S, the number of experts per token, for rows of `seq_len` tokens.

  It is K for token choice, the mean that a router of variable numbers aims at, on average the
  capacity factor for expert choice, and E*p/S for Soft MoE with p slots per expert. It counts
  zero-computation experts like others.
  """
  size = group_tokens(m.moe, seq_len)
  if m.moe.soft_slots:
    return m.moe.num_experts * m.moe.soft_slots / size
  if average := _average(m.moe, router_of(m.moe)):
    return float(average)
  return trace_router(m.moe, size).expert.shape[-1] / size


def loss_weights(config: Config) -> dict[str, float]:
  """Returns the weight of each of `Aux.losses` in the training loss, without those of weight 0."""
  return moe_loss_weights(config.model)


def moe_loss_weights(m: Config) -> dict[str, float]:
  """Returns what `loss_weights` does, from config.model alone."""
  routed = any(has_experts(m)) and not m.moe.soft_slots
  return LossOptions.of(m.moe).weights if routed else {}


def balancing_options(m: Config) -> BalancingOptions:
  """Returns how a bias balances the experts of config.model. A dense model has no rule."""
  return BalancingOptions.of(m.moe.balancing) if any(has_experts(m)) else BalancingOptions()


def balance(config: Config) -> Callable[[balancing.State, balancing.Sums], balancing.State] | None:
  """Returns the function from router state and a batch's sums to the next router state.

  It is None if no bias balances the experts.
  """
  options = balancing_options(config.model)
  return functools.partial(balancing.update, options=options) if options.chosen else None


def _observe(e: Config, router: functools.partial) -> Callable[..., dict[str, jax.Array]] | None:
  """Returns what notes for the rule of balancing how a layer's scores are, or None if nothing."""
  options = BalancingOptions.of(e.balancing)
  if options.chosen is None or options.chosen.observe is None:
    return None
  biased = ROUTERS[e.router["name"]].biased
  return functools.partial(
    balancing.observe,
    scores=functools.partial(biased, **router.keywords) if biased else jnp.asarray,
    k=option(router, "k"),
    options=options,
  )
