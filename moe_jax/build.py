"""From config to objects, and what is wrong with a config: the only reader of `config.model`."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from moe_jax import sharding
from moe_jax.dispatch import DISPATCHERS
from moe_jax.errors import ConfigError, choose
from moe_jax.experts import ACTIVATIONS
from moe_jax.layers import LOSSES, NORMS, Attention, DenseFfn, MoeLayer
from moe_jax.models import LAYER_REDUCE, REMAT, Decoder, moe_layers
from moe_jax.routing import LOOKS_AHEAD, ROUTERS, RoutingContext

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def bind(table: Mapping[str, Callable], options: Mapping[str, Any] | ConfigDict, field: str) -> functools.partial:
  """The function of `table` that `options` names, with its options bound.

  Args:
    table: name -> function whose keyword-only arguments are its options.
    options: {"name": name, name: {option: value}, ...}; the options of other names are checked, too, and not used.
    field: dotted key of `options`, for messages.

  Raises:
    ConfigError: unknown name or option (with the nearest match), option of the wrong type.
  """
  choose(f"{field}.name", options["name"], table)
  for name in options:
    if name != "name":
      choose(field, name, table)
      _check_options(table[name], options[name], f"{field}.{name}")
  return functools.partial(table[options["name"]], **dict(options.get(options["name"], {})))


def _check_options(function: Callable, options: Mapping[str, Any] | ConfigDict, field: str) -> None:
  known = {p.name: p.default for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
  for name, value in options.items():
    if name not in known:
      near = difflib.get_close_matches(name, known, n=1)
      raise ConfigError(f"{field}.{name}", value, (f"did you mean {near[0]!r}? " if near else "") + (
          f"the options are {', '.join(known)}" if known else "there are no options here"))
    default = known[name]
    number = isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool)
    if default is not None and type(value) is not type(default) and not number:
      raise ConfigError(f"{field}.{name}", value, f"must be of type {type(default).__name__}, as in {default!r}")


def model(config: ConfigDict, vocab_size: int, mesh: jax.sharding.Mesh) -> nn.Module:
  """The model of a config that `validate` accepts.

  Args:
    config: as of configs/base.py.
    vocab_size: the tokenizer's size; model.vocab_size, unless 0, must be at least that, and is used instead.
    mesh: where the model will run; its platform chooses among implementations.
  """
  wanted = config.model.vocab_size
  if wanted and wanted < vocab_size:
    raise ConfigError("model.vocab_size", wanted, f"the tokenizer has {vocab_size} ids; use at least that, or 0")
  family = choose("model.family", config.model.family, FAMILIES)
  return family(config.model, wanted or vocab_size, sharding.platform(mesh))


def _decoder(m: ConfigDict, vocab_size: int, platform: str) -> Decoder:
  dtype, scale = DTYPES[m.dtype], (2 * m.num_layers) ** -0.5  # each layer adds twice to the residual stream
  has_experts = _has_experts(m)
  dense = functools.partial(DenseFfn, d_ff=m.d_ff, activation=m.activation, output_scale=scale, dtype=dtype)
  return Decoder(
      vocab_size=vocab_size, d_model=m.d_model, has_experts=has_experts,
      attention=functools.partial(Attention, num_heads=m.num_heads, num_kv_heads=m.num_kv_heads, head_dim=m.head_dim,
                                  rope_theta=m.rope_theta, output_scale=scale, dtype=dtype),
      dense=dense, moe=_moe(m, dense, platform) if any(has_experts) else None, norm=NORMS[m.norm],
      num_biased_experts=m.moe.num_experts if any(has_experts) and m.moe.bias_update_rate else 0,
      tied_embeddings=m.tied_embeddings, dropout=m.dropout, dtype=dtype, scan_layers=m.scan_layers, remat=m.remat,
      layer_reduce=m.moe.layer_reduce)


def _moe(m: ConfigDict, dense: functools.partial, platform: str) -> functools.partial:
  e = m.moe
  shared = functools.partial(dense, d_ff=e.num_shared_experts * e.d_ff) if e.num_shared_experts else None
  capacity = dict(capacity_factor=e.capacity_factor, eval_capacity_factor=e.eval_capacity_factor,
                  capacity_basis=e.capacity_basis, min_capacity=e.min_capacity)
  router = bind(ROUTERS, e.router, "model.moe.router")
  own = inspect.signature(router).parameters.get("capacity_factor")
  if own is not None:  # the router fills its slots exactly: there is nothing to drop
    capacity = dict(capacity_factor=float(own.default), capacity_basis="tokens")
  return functools.partial(
      MoeLayer, num_experts=e.num_experts, d_ff=e.d_ff, activation=m.activation, router=router,
      dispatcher=bind(DISPATCHERS, e.dispatcher, "model.moe.dispatcher"), platform=platform, shared=shared,
      group_size=e.group_size, **capacity, jitter=e.jitter, loss_names=tuple(_loss_weights(m)),
      balance_counts=e.balance_counts, balance_over=e.balance_over, output_scale=dense.keywords["output_scale"],
      dtype=dense.keywords["dtype"])


FAMILIES = {"decoder": _decoder}


def _has_experts(m: ConfigDict) -> tuple[bool, ...]:
  return moe_layers(m.num_layers, m.moe.first, m.moe.every) if m.moe.num_experts else (False,) * m.num_layers


def loss_weights(config: ConfigDict) -> dict[str, float]:
  """What each of `Aux.losses` is multiplied by in the training loss; those of weight 0 are not there."""
  return _loss_weights(config.model)


def _loss_weights(m: ConfigDict) -> dict[str, float]:
  weights = {name: m.moe[f"{name}_loss"] for name in LOSSES}
  return {name: weight for name, weight in weights.items() if weight} if any(_has_experts(m)) else {}


def bias_update_rate(config: ConfigDict) -> float:
  """Step of the loss-free balancing bias; 0 = there is none."""
  return config.model.moe.bias_update_rate if any(_has_experts(config.model)) else 0.0


def parameter_counts(config: ConfigDict, vocab_size: int) -> tuple[int, int]:
  """(total, activated) parameters, by `jax.eval_shape` of the real model; activated: those that one token meets.

  Of E experts a token meets A/S: K for token choice, the capacity factor on average for expert choice. The embedding
  counts in full in both.
  """
  total = activated = 0
  for leaf in _parameters(config, vocab_size):
    total += leaf.value.size
    activated += leaf.value.size * (_experts_a_token(config) / config.model.moe.num_experts
                                    if "expert" in leaf.names else 1)
  return total, round(activated)


def flops_per_token(config: ConfigDict, vocab_size: int) -> float:
  """FLOPs of the forward pass's matmuls a token: 2 a weight that the token meets, and 4 L H P a layer for attention.

  Attention is counted as computed, over all L positions. Not counted: the embedding look-up, dispatch, norms,
  softmaxes. Training costs about three times this.
  """
  m = config.model
  _, activated = parameter_counts(config, vocab_size)
  vectors = sum(leaf.value.size for leaf in _parameters(config, vocab_size) if set(leaf.names) <= {"norm", "layers"})
  lookup = 0 if m.tied_embeddings else (m.vocab_size or vocab_size) * m.d_model
  attention = 4 * m.num_layers * config.data.seq_len * m.num_heads * m.head_dim
  return float(2 * (activated - vectors - lookup) + attention)


def _parameters(config: ConfigDict, vocab_size: int) -> list[nn.LogicallyPartitioned]:
  built = FAMILIES[config.model.family](config.model, config.model.vocab_size or vocab_size, "cpu")
  tokens = jax.ShapeDtypeStruct((1, config.data.seq_len), jnp.int32)
  init = lambda key, *args: built.init(key, *args, train=False)["params"]
  return jax.tree.leaves(jax.eval_shape(init, jax.random.key(0), tokens, tokens, tokens),
                         is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def _experts_a_token(config: ConfigDict) -> float:
  size = _group_size(config)
  return _trace_router(config, size).expert.shape[-1] / size


def _group_size(config: ConfigDict) -> int:
  return config.model.moe.group_size or config.data.seq_len


def _trace_router(config: ConfigDict, size: int):
  """The abstract plan of one group; raises what the router raises of its options."""
  router = bind(ROUTERS, config.model.moe.router, "model.moe.router")
  logits = jax.ShapeDtypeStruct((size, config.model.moe.num_experts), jnp.float32)
  return jax.eval_shape(router, logits, RoutingContext())


# Which names a key may take.
NAMES: Mapping[str, Any] = {
    "model.family": FAMILIES, "model.activation": ACTIVATIONS, "model.norm": NORMS, "model.dtype": DTYPES,
    "model.remat": REMAT, "model.moe.capacity_basis": ("tokens", "assignments"),
    "model.moe.balance_counts": ("top_1", "all"), "model.moe.balance_over": ("group", "global"),
    "model.moe.layer_reduce": LAYER_REDUCE, "data.pipeline": ("windows", "stream"),
}

# Words -> (whether a number is so, which keys must be). None passes: the key is a placeholder.
RANGES: Mapping[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    "at least 1": (lambda v: v >= 1, (
        "model.d_model", "model.num_layers", "model.num_heads", "model.num_kv_heads", "model.head_dim", "model.d_ff",
        "model.moe.every", "model.moe.d_ff", "model.moe.min_capacity", "data.seq_len", "train.steps",
        "train.batch_size", "train.accumulate_steps", "train.log_every", "train.eval_every", "train.checkpoint_every")),
    "at least 0": (lambda v: v >= 0, (
        "model.vocab_size", "model.moe.num_experts", "model.moe.first", "model.moe.num_shared_experts",
        "model.moe.group_size", "model.moe.balance_loss", "model.moe.z_loss", "model.moe.importance_loss",
        "model.moe.load_loss", "model.moe.bias_update_rate", "train.eval_batches", "train.output_z_loss")),
    "above 0": (lambda v: v > 0, ("model.rope_theta", "model.moe.capacity_factor", "model.moe.eval_capacity_factor")),
    "at least 0 and below 1": (lambda v: 0 <= v < 1, (
        "model.dropout", "model.moe.jitter", "data.validation_fraction")),
}


# What the entries of a tuple must be; config_flags looks only at the tuple.
ENTRIES: Mapping[str, tuple[Any, str]] = {
    "data.sources": (str, "a string, such as 'embedded:prose'"), "data.weights": ((int, float), "a number"),
}


def validate(config: ConfigDict, num_devices: int | None = None) -> None:
  """Raises ConfigError for what is wrong with a config, before anything is compiled.

  Args:
    config: as of configs/base.py.
    num_devices: devices that the mesh must fit; None: only what holds on any number of devices is checked.
  """
  for field, known in NAMES.items():
    choose(field, _get(config, field), known)
  for words, (holds, fields) in RANGES.items():
    for field in fields:
      if _get(config, field) is not None and not holds(_get(config, field)):
        raise ConfigError(field, _get(config, field), f"must be {words}")
  for field, (kinds, words) in ENTRIES.items():
    for entry in _get(config, field):
      if not isinstance(entry, kinds):
        raise ConfigError(field, _get(config, field), f"{entry!r} in it must be {words}")
  from moe_jax.training import optimizers  # not at the top: training imports this module
  optimizers.validate(config.optimizer)
  _validate_attention(config.model)
  if config.model.moe.num_experts:
    _validate_experts(config)
  _validate_batch(config)
  _validate_mesh(config, num_devices)


def _validate_attention(m: ConfigDict) -> None:
  if m.num_heads % m.num_kv_heads:
    raise ConfigError("model.num_kv_heads", m.num_kv_heads, f"must divide num_heads={m.num_heads}")
  if m.head_dim % 2:
    raise ConfigError("model.head_dim", m.head_dim, "must be even, because RoPE rotates pairs")


def _validate_experts(config: ConfigDict) -> None:
  e = config.model.moe
  if not any(_has_experts(config.model)):
    raise ConfigError("model.moe.first", e.first, f"no layer has experts: must be below num_layers="
                      f"{config.model.num_layers}, or set num_experts=0 for a dense model")
  router = bind(ROUTERS, e.router, "model.moe.router")
  bind(DISPATCHERS, e.dispatcher, "model.moe.dispatcher")
  _trace_router(config, _group_size(config))
  if router.keywords.get("k") == 1 and router.keywords.get("gate_norm") == "top_k":
    raise ConfigError("model.moe.router.top_k.gate_norm", "top_k", "with k=1 every gate is the constant 1 and the "
                      "router learns nothing from the text; use 'none', the raw probability, as Switch does")
  name = e.router["name"]
  if LOOKS_AHEAD[name](**router.keywords) and not e.allow_noncausal_routing:
    raise ConfigError("model.moe.router.name", name, f"{name} lets later tokens decide what earlier ones get, which a "
                      "causal model must not; use another router or priority, or set model.moe."
                      "allow_noncausal_routing=True")


def _validate_batch(config: ConfigDict) -> None:
  t, size = config.train, _group_size(config)
  if t.batch_size % t.accumulate_steps:
    raise ConfigError("train.accumulate_steps", t.accumulate_steps, f"must divide batch_size={t.batch_size}")
  tokens = t.batch_size // t.accumulate_steps * config.data.seq_len
  if config.model.moe.num_experts and tokens % size:
    raise ConfigError("model.moe.group_size", size, f"must divide the {tokens} tokens of a microbatch "
                      "(batch_size / accumulate_steps * seq_len), or be 0 for groups of one sequence")


def _validate_mesh(config: ConfigDict, num_devices: int | None) -> None:
  asked = dict(config.mesh)
  if num_devices is None:
    num_devices = math.prod(size for size in asked.values() if size > 0)  # -1 becomes 1
  sizes = dict(zip(sharding.AXES, sharding.mesh_sizes(asked, num_devices), strict=True))
  m, micro, rows = config.model, config.train.batch_size // config.train.accumulate_steps, sizes["data"] * sizes["fsdp"]
  if micro % rows:
    raise ConfigError("train.batch_size", config.train.batch_size, f"a microbatch of {micro} sequences must be a "
                      f"multiple of {rows}, the mesh's data={sizes['data']} times fsdp={sizes['fsdp']}")
  divided = {"fsdp": ("model.d_model",), "tensor": ("model.num_heads", "model.num_kv_heads", "model.d_ff")}
  if m.moe.num_experts:
    divided |= {"expert": ("model.moe.num_experts",), "tensor": (*divided["tensor"], "model.moe.d_ff")}
  for axis, fields in divided.items():
    for field in fields:
      if _get(config, field) % sizes[axis]:
        raise ConfigError(f"mesh.{axis}", sizes[axis], f"must divide {field}={_get(config, field)}")
  if not m.moe.num_experts and sizes["expert"] > 1:
    raise ConfigError("mesh.expert", sizes["expert"], "a dense model has no experts to split; must be 1")


def _get(config: ConfigDict, field: str) -> Any:
  return functools.reduce(lambda node, key: node[key], field.split("."), config)
