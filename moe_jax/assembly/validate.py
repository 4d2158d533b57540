"""The validation of a config, which reports what is wrong before anything is compiled."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from flax import linen as nn

from moe_jax import sharding
from moe_jax.assembly.bind import bind
from moe_jax.assembly.experts import (
  balancing_options,
  check_zero_experts,
  group_tokens,
  has_experts,
  looks_ahead,
  moe_loss_weights,
  option,
  routed_experts,
  router_of,
  trace_router,
)
from moe_jax.assembly.models import abstract_variables
from moe_jax.assembly.presets import PRESETS
from moe_jax.assembly.sections import check_config, find_key
from moe_jax.assembly.sizes import check_sizes
from moe_jax.assembly.sublayers import KEYS, kind, options, own_models
from moe_jax.data import dynamic
from moe_jax.data.span_corruption import raw_length
from moe_jax.dispatch import DISPATCHERS
from moe_jax.errors import ConfigError, choose
from moe_jax.experts import ACTIVATIONS
from moe_jax.layers.gate import check_square
from moe_jax.options import Bounds, Config
from moe_jax.routing import ROUTERS
from moe_jax.routing.balancing import BalancingOptions
from moe_jax.routing.token_choice import PRIORITIES
from moe_jax.sharding.mesh import MOST_DEVICES
from moe_jax.training import optimizers
from moe_jax.training.optimizers import OptimizerOptions

# Schedules whose warm-up must end within the run. In rsqrt and flat_rsqrt the number of warm-up
# steps also sets the scale of the decay, and neither depends on the run's length. A short run with
# one of them is the beginning of a longer one, so its warm-up may exceed it.
_REACH_THEIR_PEAK = ("cosine", "wsd", "steps", "constant")


def validate(config: Config, num_devices: int | None = None) -> None:
  """Raises ConfigError if a config cannot be trained; nothing is compiled.

  Args:
    config: The config.
    num_devices: The number of devices that the mesh must fit. None means that it is not known; then
      an axis of the mesh whose size is -1 counts as 1.
  """
  check_config(config)
  optimizers.validate(OptimizerOptions.of(config.optimizer))
  _validate_warmup(config)
  _validate_objective(config)
  d = config.data
  dynamic.check(
    dynamic.DynamicOptions.of(d.dynamic), d.sources, d.weights, d.pipeline, config.train.eval_every
  )
  _validate_block(config.model)
  check_sizes(config)
  for entry, layer_model in own_models(config.model).items():
    with _blame_sublayer(entry):
      _validate_attention(layer_model)
      if layer_model.moe.num_experts and kind(entry or "moe") == "moe":
        _validate_experts(config, layer_model)
  _validate_batch(config)
  # The optimizer would find these mistakes, too, but only after a workdir has been claimed.
  if config.optimizer.freeze:
    optimizers.frozen(nn.unbox(abstract_variables(config, 1)["params"]), config.optimizer.freeze)
  optimizers.check_free_experts(config.optimizer.freeze_experts, config.model.moe.num_experts)
  _validate_mesh(config, num_devices)


def _validate_warmup(config: Config) -> None:
  """Checks that the learning rate reaches its peak within the run."""
  o, steps = config.optimizer, config.train.steps
  if o.schedule in _REACH_THEIR_PEAK and o.warmup_steps > steps:
    raise ConfigError(
      "optimizer.warmup_steps",
      o.warmup_steps,
      f"must be at most train.steps={steps}, or the schedule "
      f"{o.schedule} would never reach its peak; set --config.optimizer.warmup_steps={steps // 10}",
    )


def _validate_objective(config: Config) -> None:
  """Checks that the data objective suits the family: encoder-decoders need span corruption."""
  family, d = config.model.family, config.data
  needed = "span_corruption" if family == "encoder_decoder" else "next_token"
  if d.objective != needed:
    raise ConfigError(
      "data.objective",
      d.objective,
      f"model.family={family!r} trains on {needed!r}; use that, or another family",
    )
  if d.objective == "span_corruption":
    raw_length(d.encoder_len, d.seq_len, d.noise_density, d.mean_span)


def _validate_block(m: Config) -> None:
  """Checks model.block, which Brainformers need and other families must not have.

  A Brainformer has experts if and only if one of its sublayers is of the kind "moe".
  """
  if (m.family == "brainformer") != bool(m.block):
    raise ConfigError(
      "model.block",
      m.block,
      "is for family='brainformer', which needs it: its sublayers, such as "
      "('attention', 'moe:gate=top_2,hidden=2048', 'ffn'); must be () in other families",
    )
  for entry in m.block:
    values = options(entry)
    for name, value in values.items():
      _check_sublayer_option(entry, name, value)
    if kind(entry) == "moe" and not m.moe.num_experts:
      raise ConfigError(
        "model.block", entry, "there are no experts for it; set model.moe.num_experts"
      )
    if m.moe.soft_slots and {"gate", "capacity"} & set(values):
      raise ConfigError(
        "model.block",
        entry,
        f"Soft MoE (soft_slots={m.moe.soft_slots}) has neither gate nor capacity; leave them out",
      )
  if m.block and m.moe.num_experts and not any(has_experts(m)):
    raise ConfigError(
      "model.moe.num_experts", m.moe.num_experts, "no sublayer of model.block is 'moe'; must be 0"
    )
  if m.block and m.moe.extra_ffn:
    raise ConfigError(
      "model.moe.extra_ffn",
      True,
      "family='brainformer' has none but those that model.block names; must be False",
    )


def _check_sublayer_option(entry: str, name: str, value: Any) -> None:
  """Checks that a sublayer's option is within the bounds of the key that it replaces."""
  key = "moe.capacity_factor" if name == "capacity" else KEYS[kind(entry)].get(name)
  declared = find_key(f"model.{key}")
  if declared and isinstance(declared.rule, Bounds) and not declared.rule.hold(value):
    raise ConfigError("model.block", entry, f"{name} {declared.rule.words}")


@contextlib.contextmanager
def _blame_sublayer(entry: str) -> Iterator[None]:
  """Turns a ConfigError of the body into one about this sublayer, if the sublayer has options."""
  try:
    yield
  except ConfigError as error:
    if not entry.partition(":")[2]:
      raise
    raise ConfigError(
      "model.block", entry, f"{error.field}={error.value!r} {error.remedy}"
    ) from error


def _validate_attention(m: Config) -> None:
  """Checks the options of attention and of relative biases."""
  if m.relative_shared and (
    m.position != "relative" or m.family not in ("decoder", "encoder_decoder")
  ):
    raise ConfigError(
      "model.relative_shared",
      True,
      "must be False: it is for position='relative' in the families "
      "'decoder' and 'encoder_decoder', whose layers all have the same heads",
    )
  if m.rope.scaling != "none":
    _validate_rope(m)
  if m.global_every and (m.family != "decoder" or m.attention != "grouped_query"):
    raise ConfigError(
      "model.global_every",
      m.global_every,
      "is for the layers of family='decoder' with attention='grouped_query'; must be 0",
    )
  if not m.global_positions and not m.global_every:
    raise ConfigError(
      "model.global_positions",
      False,
      "there are no global layers; must be True, or set global_every",
    )
  if m.family == "lstm":
    return _refuse(m, _NOT_LSTM, "family='lstm'", "another family")
  if m.attention == "latent":
    return _validate_latent(m)
  if m.num_heads % m.num_kv_heads:
    raise ConfigError("model.num_kv_heads", m.num_kv_heads, f"must divide num_heads={m.num_heads}")
  if m.position == "rope" and m.head_dim % 2:
    raise ConfigError("model.head_dim", m.head_dim, "must be even, because RoPE rotates pairs")
  if m.rotary_dim and (m.rotary_dim % 2 or m.rotary_dim > m.head_dim or m.position != "rope"):
    raise ConfigError(
      "model.rotary_dim",
      m.rotary_dim,
      f"must be 0, or with position='rope' an even number up to head_dim={m.head_dim}",
    )
  if m.relative_buckets % 4:
    raise ConfigError(
      "model.relative_buckets",
      m.relative_buckets,
      "must be a multiple of 4: two directions, and of each half the buckets hold one distance",
    )
  if m.relative_max_distance <= m.relative_buckets // 2:
    raise ConfigError(
      "model.relative_max_distance",
      m.relative_max_distance,
      f"must be above {m.relative_buckets // 2}"
      f", half of relative_buckets={m.relative_buckets}, which hold one distance each",
    )
  if m.family == "encoder_decoder" and m.sliding_window:
    raise ConfigError(
      "model.sliding_window",
      m.sliding_window,
      "is for family='decoder', whose attention is causal; must be 0",
    )


def _validate_rope(m: Config) -> None:
  """Checks the scaling of the rotary embedding, which is not "none"."""
  if m.position != "rope" or m.family == "lstm":
    raise ConfigError(
      "model.rope.scaling", m.rope.scaling, "scales position='rope' of attention; must be 'none'"
    )
  if m.rope.scaling == "llama3" and m.rope.high_freq_factor <= m.rope.low_freq_factor:
    raise ConfigError(
      "model.rope.high_freq_factor",
      m.rope.high_freq_factor,
      f"must be above low_freq_factor={m.rope.low_freq_factor}",
    )
  if m.rope.scaling == "yarn" and m.rope.beta_fast <= m.rope.beta_slow:
    raise ConfigError(
      "model.rope.beta_fast", m.rope.beta_fast, f"must be above beta_slow={m.rope.beta_slow}"
    )
  if m.rope.score_mscale and m.attention != "latent":
    raise ConfigError(
      "model.rope.score_mscale", m.rope.score_mscale, "is for attention='latent'; must be 0"
    )


# Keys that latent attention does not support, with the values that they must have.
_NOT_LATENT: Mapping[str, Any] = {
  "family": "decoder",
  "position": "rope",
  "qkv_bias": False,
  "output_bias": False,
  "qk_norm": False,
  "clip_qkv": 0.0,
  "sliding_window": 0,
  "query_scale": 0.0,
  "rotary_dim": 0,
  "sinks": False,
}
# Keys that LSTM layers, which have no attention and no dense FFN, do not support, with the values
# that they must have.
_NOT_LSTM: Mapping[str, Any] = {
  "attention": "grouped_query",
  "qkv_bias": False,
  "output_bias": False,
  "qk_norm": False,
  "clip_qkv": 0.0,
  "sliding_window": 0,
  "query_scale": 0.0,
  "rotary_dim": 0,
  "sinks": False,
  "moe.extra_ffn": False,
}


def _refuse(m: Config, required: Mapping[str, Any], who: str, instead: str) -> None:
  """Raises ConfigError if a key of config.model does not have the value that `who` requires."""
  for key, value in required.items():
    if _get(m, key) != value:
      raise ConfigError(
        f"model.{key}", _get(m, key), f"{who} has only {value!r}; use that, or {instead}"
      )


def _validate_latent(m: Config) -> None:
  """Checks the options of latent attention."""
  _refuse(m, _NOT_LATENT, "attention='latent'", "attention='grouped_query'")
  if m.latent.rope_dim % 2:
    raise ConfigError(
      "model.latent.rope_dim", m.latent.rope_dim, "must be even, because RoPE rotates pairs"
    )


def _validate_experts(config: Config, m: Config) -> None:
  """Checks the layers with experts that read `m`.

  Args:
    config: The config.
    m: Its section `model`, as one of these layers reads it.
  """
  e = m.moe
  if e.router.get("name") in PRESETS.keys() - ROUTERS.keys():
    raise ConfigError(
      "model.moe.router.name",
      e.router["name"],
      "is a preset, which is a router with a paper's options"
      f" and losses; use --config.model.moe={e.router['name']}",
    )
  if e.dense_layers and max(e.dense_layers) >= max(m.num_layers, m.num_encoder_layers):
    raise ConfigError(
      "model.moe.dense_layers", e.dense_layers, f"there are only {m.num_layers} layers, from 0"
    )
  if not any(has_experts(m)):
    raise ConfigError(
      "model.moe.first",
      e.first,
      f"no layer has experts: must be below num_layers={m.num_layers}, or "
      "set num_experts=0 for a dense model",
    )
  if e.activation:
    choose("model.moe.activation", e.activation, ACTIVATIONS)
  router, name = router_of(e), e.router["name"]
  bind(DISPATCHERS, e.dispatcher, "model.moe.dispatcher")
  if e.encoder_priority:
    _validate_encoder_priority(m, router)
  if e.shared_gate and not e.num_shared_experts:
    raise ConfigError(
      "model.moe.shared_gate",
      e.shared_gate,
      "there is no shared expert to gate; must be False, or set num_shared_experts",
    )
  check_zero_experts(e)
  if e.gate_network == "product_keys" and not e.soft_slots:
    check_square(routed_experts(e))
  if e.gate_residual and (m.family != "decoder" or e.soft_slots):
    raise ConfigError(
      "model.moe.gate_residual",
      True,
      "is for routers of family='decoder', whose layers pass their logits on; must be False",
    )
  if e.hash_layers:
    _validate_hash_layers(m)
  if e.soft_slots:
    for key, value, none in (
      ("balancing.rule", e.balancing.rule, "none"),
      ("shared_gate", e.shared_gate, False),
      ("latent_width", e.latent_width, 0),
      ("router_norm", e.router_norm, "none"),
      ("router_bias", e.router_bias, False),
      ("expert_scale", e.expert_scale, False),
      ("gate_on", e.gate_on, "output"),
    ):
      if value != none:
        raise ConfigError(
          f"model.moe.{key}",
          value,
          f"Soft MoE (soft_slots={e.soft_slots}) has none; must be {none}",
        )
  if not e.soft_slots:
    for length in _lengths(config).values():
      trace_router(e, group_tokens(e, length))
    _validate_gates(router, name)
    _validate_balancing(m, name)
  if looks_ahead(e) == "yes" and not e.allow_noncausal_routing:
    field, shown = ("soft_slots", e.soft_slots) if e.soft_slots else ("router.name", name)
    raise ConfigError(
      f"model.moe.{field}",
      shown,
      f"{'Soft MoE' if e.soft_slots else name} lets later tokens decide what earlier ones get, "
      "which a causal model must not; use another router or priority, or set "
      "model.moe.allow_noncausal_routing=True",
    )


def _validate_hash_layers(m: Config) -> None:
  """Checks that the layers whose tokens take experts by their ids are there, and how."""
  e, layers = m.moe, sum(has_experts(m))
  if m.family != "decoder" or e.soft_slots or e.router["name"] != "scored_top_k":
    raise ConfigError(
      "model.moe.hash_layers",
      e.hash_layers,
      "takes its gates from the router scored_top_k of family='decoder'; must be 0, or use these",
    )
  if e.hash_layers > layers:
    raise ConfigError(
      "model.moe.hash_layers",
      e.hash_layers,
      f"only {layers} layers have experts; must be at most that",
    )


def _validate_encoder_priority(m: Config, router: functools.partial) -> None:
  """Checks that there is an encoder whose router has the option `priority`."""
  value = m.moe.encoder_priority
  if m.family != "encoder_decoder" or m.moe.soft_slots or option(router, "priority") is None:
    raise ConfigError(
      "model.moe.encoder_priority",
      value,
      "needs family='encoder_decoder' and a router with an option "
      "`priority`, such as st_moe; must be ''",
    )
  choose("model.moe.encoder_priority", value, PRIORITIES)


def _validate_gates(router: functools.partial, name: str) -> None:
  """Checks that no gate is the constant 1, because then the router would get no gradient."""
  k, norm = option(router, "k"), option(router, "gate_norm")
  if k == 1 and norm == "top_k":
    raise ConfigError(
      f"model.moe.router.{name}.gate_norm",
      norm,
      "with k=1 every gate is the constant 1 and the "
      "router learns nothing from the text; use 'none', the raw score, as Switch does",
    )
  if (
    name == "noisy_top_k"
    and k == 1
    or name == "hierarchical"
    and k == option(router, "primary_k") == 1
  ):
    raise ConfigError(
      f"model.moe.router.{name}.k",
      k,
      "every gate would be the constant 1 and the router would learn "
      "nothing from the text; use 2 or more, or the router top_k with gate_norm='none'",
    )


def _validate_balancing(m: Config, name: str) -> None:
  """Checks the options of load balancing; `name` is that of the router."""
  e, weights = m.moe, moe_loss_weights(m)
  if e.num_experts % e.devices:
    raise ConfigError("model.moe.devices", e.devices, f"must divide num_experts={e.num_experts}")
  for loss in ("device", "communication"):
    if loss in weights and e.devices == 1:
      raise ConfigError(
        f"model.moe.{loss}_loss",
        weights[loss],
        "is a constant while model.moe.devices=1; set the number of groups that the experts form",
      )
  groups = option(router_of(e), "kept_groups") and option(router_of(e), "groups")
  if "communication" in weights and groups and groups != e.devices:
    raise ConfigError(
      "model.moe.devices", e.devices, f"must be the router's groups={groups} for communication_loss"
    )
  if ("threshold" in weights) != (name == "strictly_balanced"):
    raise ConfigError(
      "model.moe.threshold_loss",
      e.threshold_loss,
      "must be above 0 with the router "
      "strictly_balanced, which learns its thresholds by it, and 0 with all others",
    )
  rule = BalancingOptions.of(e.balancing).chosen
  if rule is not None and ROUTERS[name].rules and e.balancing.rule not in ROUTERS[name].rules:
    raise ConfigError(
      "model.moe.balancing.rule",
      e.balancing.rule,
      f"does not move {name}; must be 'none' or {' or '.join(map(repr, ROUTERS[name].rules))}",
    )
  if rule is not None and rule.general and ROUTERS[name].biased is None:
    biased = [each for each, router in ROUTERS.items() if router.biased and not router.rules]
    raise ConfigError(
      "model.moe.balancing.rule",
      e.balancing.rule,
      f"{name} reads no bias; must be 'none', or use one of {', '.join(biased)}",
    )
  if rule is not None and not rule.general and e.balancing.rule not in ROUTERS[name].rules:
    (only,) = [each for each, router in ROUTERS.items() if e.balancing.rule in router.rules]
    raise ConfigError(
      "model.moe.balancing.rule",
      e.balancing.rule,
      f"is only for the router {only}; use it, or another rule",
    )
  if e.sparsity_loss and name != "relu":
    raise ConfigError(
      "model.moe.sparsity_loss",
      e.sparsity_loss,
      "is for the router relu, whose gates it makes 0; must be 0 with others",
    )
  k = option(router_of(e), "k")
  general = rule is not None and rule.general and rule.observe is not None
  if general and k is not None and k >= routed_experts(e):
    raise ConfigError(
      "model.moe.balancing.rule",
      e.balancing.rule,
      f"compares chosen experts with others, and each token takes all {routed_experts(e)}; must be "
      "'none', because all experts get the same",
    )


def _validate_batch(config: Config) -> None:
  """Checks that microbatches and routing groups divide the batch, and what they rule out."""
  t, e = config.train, config.model.moe
  rule = balancing_options(config.model).chosen
  if rule is not None and not rule.adds_up and t.accumulate_steps > 1:
    # Routers with rules of their own cannot take the histogram.
    other = "set rule to quantile_histogram, or " if rule.general else ""
    raise ConfigError(
      "model.moe.balancing.rule",
      e.balancing.rule,
      f"sorts the whole batch at once, which train.accumulate_steps={t.accumulate_steps} cuts into "
      f"microbatches; {other}set train.accumulate_steps=1",
    )
  if t.batch_size % t.accumulate_steps:
    raise ConfigError(
      "train.accumulate_steps", t.accumulate_steps, f"must divide batch_size={t.batch_size}"
    )
  rows = t.batch_size // t.accumulate_steps
  if e.num_experts and not e.group_size and rows % e.group_rows:
    raise ConfigError(
      "model.moe.group_rows",
      e.group_rows,
      f"must divide the {rows} sequences of a microbatch (batch_size / accumulate_steps)",
    )
  for name, length in _lengths(config).items():
    tokens, size = rows * length, group_tokens(e, length)
    if e.num_experts and tokens % size:
      raise ConfigError(
        "model.moe.group_size",
        size,
        f"must divide the {tokens} tokens of a microbatch "
        f"(batch_size / accumulate_steps * {name}), or be 0 for groups of group_rows sequences",
      )


def _lengths(config: Config) -> dict[str, int]:
  """Returns the lengths of the rows whose tokens are routed, by their keys of the section data."""
  d = config.data
  return {"seq_len": d.seq_len} | (
    {"encoder_len": d.encoder_len} if d.objective == "span_corruption" else {}
  )


def _validate_mesh(config: Config, num_devices: int | None) -> None:
  """Checks that the mesh suits the devices, and that the model and the batch suit the mesh."""
  sharding.check_rules(dict(config.sharding))
  mesh = dict(config.mesh)
  if num_devices is None:
    # An axis of size -1 gets all devices that remain, so it counts as 1 here.
    num_devices = math.prod(size for size in mesh.values() if size > 0)
    if num_devices > MOST_DEVICES:
      raise ConfigError(
        "mesh",
        mesh,
        f"needs {num_devices:,} devices, and no machine has more than "
        f"{MOST_DEVICES:,}; make an axis smaller",
      )
  sizes: dict[str, int] = dict(
    zip(sharding.AXES, sharding.mesh_sizes(mesh, num_devices), strict=True)
  )
  if misfit := _misfit(config, sizes):
    fits = sharding.nearest_meshes(sizes, num_devices, lambda others: not _misfit(config, others))
    field, value, remedy = misfit
    raise ConfigError(field, value, remedy + (f"; nearest meshes that fit: {fits}" if fits else ""))


def _misfit(config: Config, sizes: Mapping[str, int]) -> tuple[str, Any, str] | None:
  """Returns the first reason why a mesh of these sizes does not suit a config.

  Args:
    config: The config.
    sizes: The size of each axis of the mesh.

  Returns:
    `(field, value, remedy)` of a ConfigError, or None if the mesh suits.
  """
  m, t = config.model, config.train
  if not m.moe.num_experts and sizes["expert"] > 1:
    return "mesh.expert", sizes["expert"], "a dense model has no experts to split; must be 1"
  micro, rows = (
    t.batch_size // t.accumulate_steps,
    math.prod(sizes[axis] for axis in sharding.RULES["batch"]),
  )
  if micro % rows:
    product = " times ".join(f"{axis}={sizes[axis]}" for axis in sharding.RULES["batch"])
    near = " or ".join(
      str(n * rows * t.accumulate_steps) for n in (micro // rows, micro // rows + 1) if n
    )
    return (
      "train.batch_size",
      t.batch_size,
      (
        f"a microbatch of {micro} sequences must be a multiple of {rows}, the "
        f"mesh's {product}; nearest batch sizes: {near}"
      ),
    )
  kv_heads = () if m.attention == "latent" else ("num_kv_heads",)
  tensor_fields = ("num_heads", *kv_heads, "d_ff")
  if m.family == "lstm":
    tensor_fields = ("lstm_units" if m.lstm_units else "d_model",)
  # For each axis of the mesh, the fields of config.model that its size must divide.
  fields_of = {"fsdp": ("d_model",), "tensor": tensor_fields}
  if m.moe.num_experts:
    fields_of |= {"expert": ("moe.num_experts",), "tensor": (*fields_of["tensor"], "moe.d_ff")}
    # A width of 0, which stands for d_model, divides, too.
    fields_of["fsdp"] = ("d_model", "moe.latent_width")
  for entry, layer_model in {"": m, **own_models(m)}.items():
    for axis, fields in fields_of.items():
      for field in fields:
        if _get(layer_model, field) % sizes[axis]:
          where = f" of model.block's {entry!r}" if entry else ""
          return (
            f"mesh.{axis}",
            sizes[axis],
            f"must divide model.{field}={_get(layer_model, field)}{where}",
          )
  return None


def _get(config: Config, field: str) -> Any:
  """Returns the value of a dotted key."""
  return functools.reduce(lambda node, key: node[key], field.split("."), config)
