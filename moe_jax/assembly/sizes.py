"""How large a model and its batch are at least, by arithmetic: what no machine could hold is
refused before tracing."""

from __future__ import annotations

from collections.abc import Iterator

from moe_jax.assembly.experts import encoder_layers, group_tokens, has_experts
from moe_jax.assembly.sublayers import kind, layout, own_models
from moe_jax.errors import ConfigError
from moe_jax.models import find_pattern
from moe_jax.models.options import LAYERS
from moe_jax.options import Config

# 1.1 PB: 170 times the 6.4 TB of Switch-C's 1.6 trillion float32 weights, and the memory of 14,000
# H100s.
MOST_BYTES = 2**50
BYTES = 4  # of a float32 value
# Layers that are traced and compiled one by one, because nothing repeats or model.scan_layers is
# off; as many as GPT-3 has. Tracing 128 takes a minute, compiling them far longer. Published models
# have at most 3 before their pattern.
MOST_COMPILED = 96
DEEPEST = LAYERS.high


def check_sizes(config: Config) -> None:
  """Refuses a model or a batch of more than `MOST_BYTES`. All its numbers are within their bounds.

  Raises:
    ConfigError: names the key that takes part in the largest product.
  """
  m = config.model
  if m.family == "brainformer" and m.num_layers * len(m.block) > DEEPEST:
    raise ConfigError(
      "model.num_layers",
      m.num_layers,
      f"times the {len(m.block)} sublayers of model.block must be at most {DEEPEST:,}",
    )
  _check_compiled(m)
  for words, parts in (("weights", list(weights(m))), ("a microbatch", list(activations(config)))):
    total = BYTES * sum(count for _, count in parts)
    if total > MOST_BYTES:
      field, count = max(parts, key=lambda part: part[1])
      value = config
      for name in field.split("."):
        value = value[name]
      raise ConfigError(
        field,
        value,
        f"{words} would take {total:.3g} bytes at least, {BYTES * count:.3g} of them for what "
        f"this key multiplies; the most that is accepted is {MOST_BYTES:.3g}, so make it smaller",
      )


def _check_compiled(m: Config) -> None:
  layers, split = layout(m) or has_experts(m), encoder_layers(m)
  for tower in (layers[:split], layers[split:]):
    pattern = find_pattern(tower)
    single = (
      len(tower) - max(pattern.repeats - 1, 0) * pattern.period if m.scan_layers else len(tower)
    )
    if single > MOST_COMPILED:
      field = "scan_layers" if not m.scan_layers else "moe.first"
      raise ConfigError(
        f"model.{field}",
        m.moe.first if m.scan_layers else False,
        f"{single} layers would be compiled one by one, and at most {MOST_COMPILED} may; must be "
        f"{'smaller' if m.scan_layers else True}",
      )


def weights(m: Config) -> Iterator[tuple[str, int]]:
  """`(key, number of weights that it multiplies)`, at least: two matrices an FFN or expert, no
  biases or norms."""
  yield "model.vocab_size", (m.vocab_size + m.target_vocab_size) * m.d_model
  layers = has_experts(m)
  for entry, own in own_models(m).items():
    repeats = m.num_layers if entry else len(layers)
    attends = m.family != "lstm" and kind(entry or "attention") == "attention"
    if attends and m.attention != "latent":
      yield "model.num_heads", repeats * 2 * own.d_model * own.num_heads * own.head_dim
      yield "model.num_kv_heads", repeats * 2 * own.d_model * own.num_kv_heads * own.head_dim
    elif attends:
      yield (
        "model.num_heads",
        repeats * own.num_heads * own.latent.value_dim * (own.latent.kv_rank + own.d_model),
      )
    if m.family == "lstm":
      yield "model.lstm_units", repeats * 4 * (own.lstm_units or own.d_model) * own.d_model
    elif entry == "" or kind(entry) == "ffn":
      dense = repeats if entry else layers.count(False)
      yield "model.d_ff", dense * 2 * own.d_model * own.d_ff
    if own.moe.num_experts and kind(entry or "moe") == "moe":
      sparse = repeats if entry else layers.count(True)
      yield (
        "model.moe.num_experts",
        sparse * own.moe.num_experts * own.d_model * (2 * own.moe.d_ff + 1),
      )
      yield (
        "model.moe.num_shared_experts",
        sparse * own.moe.num_shared_experts * own.d_model * 2 * own.moe.d_ff,
      )


def activations(config: Config) -> Iterator[tuple[str, int]]:
  """`(key, number of values)` of the largest arrays of one layer for a microbatch and for a group
  of tokens."""
  m, d, t = config.model, config.data, config.train
  rows = max(t.batch_size // t.accumulate_steps, 1)
  for name, length in {
    "seq_len": d.seq_len,
    "encoder_len": d.encoder_len * (d.objective != "next_token"),
  }.items():
    yield f"data.{name}", rows * length * max(m.d_model, m.d_ff)
    if m.family != "lstm":
      yield "model.num_heads", rows * m.num_heads * length * length
  yield "model.vocab_size", rows * d.seq_len * max(m.vocab_size, m.target_vocab_size)
  if m.moe.num_experts:
    size = group_tokens(m.moe, d.seq_len)
    yield (
      "model.moe.num_experts",
      max(rows * d.seq_len, size) * m.moe.num_experts * max(m.moe.soft_slots, 1),
    )
    yield "model.moe.soft_slots", m.moe.num_experts * m.moe.soft_slots * m.d_model
    yield (
      "model.moe.group_size" if m.moe.group_size else "model.moe.group_rows",
      size * max(m.d_model, m.moe.d_ff),
    )
