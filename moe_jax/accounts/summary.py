"""A config's model and routing in words, as `describe` and the header of a run print them."""

from __future__ import annotations

import functools

from moe_jax.assembly.experts import (
  capacity_options,
  encoder_layers,
  experts_a_token,
  group_tokens,
  has_experts,
  layers_with_experts,
  looks_ahead,
  moe_loss_weights,
  option,
  router_of,
  trace_router,
)
from moe_jax.layers.zero_experts import WITHOUT_FFN
from moe_jax.options import Config


def model_summary(config: Config) -> str:
  """Returns the architecture in words, with one line for each aspect."""
  m = config.model
  encoder, layers = encoder_layers(m), has_experts(m)
  stacks = f"{encoder} + {m.num_layers}" if encoder else f"{m.num_layers}"
  vocabulary = (
    " and ".join(f"{size:,}" for size in (m.vocab_size, m.target_vocab_size) if size)
    or "the tokenizer's"
  )
  rows = (
    f"{config.data.encoder_len} tokens to {config.data.seq_len}"
    if encoder
    else f"{config.data.seq_len} tokens"
  )
  lines = (
    {
      "model": f"{m.family.replace('_', '-')}, {stacks} {'blocks' if m.block else 'layers'} "
      f"of width {m.d_model}, "
      f"{sum(layers)} {'sublayers ' if m.block else ''}with experts",
      "block": " | ".join(m.block),
    }
    | (
      _recurrence_words(m)
      if m.family == "lstm"
      else {
        "attention": _attention_words(m),
        "ffn": f"{m.activation} of width {m.d_ff}"
        + (f", {m.ffn_bias} bias" if m.ffn_bias != "none" else "")
        + (
          f", and one more before each of the {sum(layers)} layers' experts"
          if m.moe.extra_ffn
          else ""
        ),
      }
    )
    | {
      "embedding": f"{vocabulary} entries, {'tied to' if m.tied_embeddings else 'beside'} "
      "the output projection",
      "numbers": f"{m.dtype} activations, {'no norms' if m.family == 'lstm' else m.norm}, "
      f"dropout {m.dropout:g}, remat={m.remat}",
      "batch": f"{config.train.batch_size:,} rows of {rows}, {config.train.steps:,} steps of "
      f"{config.optimizer.name}",
    }
  )
  return "\n".join(f"{name:>9}: {words}" for name, words in lines.items() if words)


def _recurrence_words(m: Config) -> dict[str, str]:
  """Returns the lines about the LSTM layers and their experts."""
  units = m.lstm_units or m.d_model
  projected = f", projected to {m.d_model}" if units != m.d_model else ""
  lines = {"lstm": f"{units} units{projected}, zero state at the start of each document"}
  return lines | (
    {"experts": f"{m.moe.activation or m.activation}, their output through a sigmoid"}
    if any(has_experts(m))
    else {}
  )


def _attention_words(m: Config) -> str:
  """Returns the line about attention."""
  if m.attention == "latent":
    queries = f"queries from {m.latent.query_rank}" if m.latent.query_rank else "full queries"
    return (
      f"latent, {m.num_heads} heads of {m.latent.nope_dim} + {m.latent.rope_dim} rotated and "
      f"values of {m.latent.value_dim}, keys and values from {m.latent.kv_rank}, {queries}"
    )
  more = [f"query scale {m.query_scale:g}"] * bool(m.query_scale) + ["biases"] * m.qkv_bias
  more += ["an output bias"] * m.output_bias
  by_head = " head by head" * (m.qk_norm_over == "head")
  more += [f"normalised queries and keys{by_head}"] * m.qk_norm
  more += [f"clipped to {m.clip_qkv:g}"] * bool(m.clip_qkv)
  more += [f"{m.rotary_dim} features rotated"] * bool(m.rotary_dim) + ["sinks"] * m.sinks
  more += [f"window of {m.sliding_window}"] * bool(m.sliding_window)
  without = " or positions" * (not m.global_positions)
  more += [f"each {m.global_every}. layer without window{without}"] * bool(m.global_every)
  biases = "relative biases, one table per stack" if m.relative_shared else "relative biases"
  scaled = f", {m.rope.scaling} by {m.rope.factor:g}" if m.rope.scaling != "none" else ""
  where = {
    "rope": f"rope (theta {m.rope_theta:g}{scaled})",
    "relative": biases,
    "none": "no positions",
  }[m.position]
  return ", ".join(
    [f"{m.num_heads} heads of {m.head_dim}, {m.num_kv_heads} of keys and values", where, *more]
  )


def routing_summary(config: Config) -> str:
  """Returns the routing in words, with one line for each aspect, or "" for a dense model.

  If the sublayers of a Brainformer route differently, each kind of routing has its own lines.
  """
  # The keys of a dict drop repetitions and keep the order.
  return "\n".join(
    dict.fromkeys(_routing_words(m, config.data.seq_len) for m in layers_with_experts(config.model))
  )


def _routing_words(m: Config, seq_len: int) -> str:
  """Returns the lines about the routing of layers that read `m` as their section `model`."""
  e = m.moe
  size = group_tokens(e, seq_len)
  if e.soft_slots:
    mixing = f"each slot mixes all {size} tokens"
    return f"routing: soft_moe, {e.num_experts} experts of {e.soft_slots} slots; {mixing}"
  router = router_of(e)
  options = (
    ", ".join(f"{name}={value!r}" for name, value in router.keywords.items()) or "no options"
  )
  lines = {
    "routing": f"{e.router['name']} ({options}) over {e.num_experts} experts of width {e.d_ff}"
    f"{_placed_words(e)}{_zero_words(e)}, "
    f"groups of {size} tokens, {experts_a_token(m, seq_len):g} experts per token, "
    f"{_shared_words(e)}",
    "capacity": _capacity_words(e, router, size),
    "priority": option(router, "priority", "the router's own order"),
    "gates": f"{_norm_words(option(router, 'gate_norm'))}, times {e.routed_scale:g}; "
    f"{e.gate_network} gate network, {e.router_dtype}"
    + (f"; jitter {e.jitter:g} on its {e.jitter_on}" if e.jitter else ""),
    "losses": _loss_words(m),
    "causal": CAUSAL[
      "no" if looks_ahead(e) == "overflow" and _dropless(e, router) else looks_ahead(e)
    ],
  }
  return "\n".join(f"{name:>9}: {words}" for name, words in lines.items())


# What each value of `looks_ahead` means for a causal model.
CAUSAL = {
  "no": "no later token changes what an earlier one gets",
  "overflow": "where slots run out, a later token's first choice displaces an earlier one's second",
  "yes": "NOT causal: later tokens change what earlier ones get",
}


def _norm_words(gate_norm: str | None) -> str:
  """Returns how gates are normalised; None means that the router has no such option."""
  return f"gate_norm={gate_norm}" if gate_norm else "normalised as the router defines"


def _dropless(e: Config, router: functools.partial) -> bool:
  """Returns whether experts have room for all tokens in training and in evaluation."""
  capacity = capacity_options(e, router)
  factors = (capacity.capacity_factor, capacity.eval_capacity_factor)
  return factors == (None, None) and not capacity.capacity_slots


def _placed_words(e: Config) -> str:
  """Returns in which space experts compute and which layers route by ids, or "" if as usual."""
  space = f" in a space of width {e.latent_width}" if e.latent_width else ""
  first = f", by hash_top_k in the first {e.hash_layers} of the layers" if e.hash_layers else ""
  return space + first


def _zero_words(e: Config) -> str:
  """Returns how many experts there are beside those with an FFN, or "" without any."""
  counts = [f"{e[name]} {name.partition('_')[0]}" for name in WITHOUT_FFN if e[name]]
  if not counts:
    return ""
  words = " and ".join(filter(None, (", ".join(counts[:-1]), counts[-1])))
  return f" and {words} experts without an FFN"


def _shared_words(e: Config) -> str:
  """Returns how many experts are shared by all tokens, and whether they are gated."""
  if not e.num_shared_experts:
    return "none shared"
  return f"{e.num_shared_experts} shared" + (" behind a sigmoid gate" if e.shared_gate else "")


def _capacity_words(e: Config, router: functools.partial, size: int) -> str:
  """Returns an expert's capacity in training and in evaluation, for groups of `size` tokens."""
  capacity = capacity_options(e, router)
  if capacity.capacity_slots:
    return f"{capacity.capacity_slots} slots per expert"
  words, basis = [], {"tokens": "S/E", "assignments": "S*K/E"}[capacity.capacity_basis]
  assignments = trace_router(e, size).expert.shape[-1]
  for when, train in (("training", True), ("evaluation", False)):
    slots = capacity.slots(size, e.num_experts, assignments, train)
    factor = capacity.factor(train)
    words.append(
      f"{when}: "
      + ("dropless" if slots is None else f"{slots} slots per expert ({factor:g} {basis})")
    )
  return "; ".join(words)


def _loss_words(m: Config) -> str:
  """Returns the auxiliary losses with their weights and options."""
  weights = moe_loss_weights(m)
  words = [f"{name} {weight:g}" for name, weight in weights.items()]
  if {"balance", "device", "communication"} & set(weights):
    words.append(
      f"f counts {m.moe.balance_counts}, per {m.moe.balance_over}, P of {m.moe.balance_scores}"
    )
  if "importance" in weights:
    words.append(f"importance of {m.moe.importance_of}")
  if m.moe.balancing.rule != "none":
    words.append(f"a bias moved by the rule {m.moe.balancing.rule}")
  return ", ".join([*words, f"{m.moe.layer_reduce} over layers"]) if words else "none"
