"""Lower bounds of the sizes of a model and its batch, which refuse impossible ones before tracing.

The bounds are computed by arithmetic alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from moe_jax.assembly.experts import encoder_layers, group_tokens, has_experts, layer_kinds
from moe_jax.assembly.sublayers import kind, layout, own_models
from moe_jax.errors import ConfigError
from moe_jax.layers.zero_experts import WITHOUT_FFN
from moe_jax.models import find_pattern
from moe_jax.models.options import LAYERS
from moe_jax.options import Config

# This is 1.1 PB, which is 170 times the 6.4 TB of Switch-C's 1.6 trillion float32 weights, and the
# memory of 14,000 H100s.
MOST_BYTES = 2**50
# The bytes of a float32 value.
BYTES = 4
# The number of layers that may be traced and compiled one by one, because they do not repeat or
# because model.scan_layers is False. GPT-3 has as many. Tracing 128 layers takes a minute, and
# compiling them far longer. Published models have at most 3 layers before the pattern that repeats.
MOST_COMPILED = 96
DEEPEST = LAYERS.high


def check_sizes(config: Config) -> None:
  """Raises ConfigError if a model or a batch is too large for any machine.

  The values of the config must be within their bounds already.

  Raises:
    ConfigError: If the weights or a microbatch take more than `MOST_BYTES` (then the error names
      the key that takes part in the largest product), or if there are too many layers.
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
  """Raises ConfigError if more than `MOST_COMPILED` layers would be compiled one by one."""
  layers, split = layout(m) or layer_kinds(m), encoder_layers(m)
  for tower in (layers[:split], layers[split:]):
    pattern = find_pattern(tower)
    # Of the layers that are scanned, only one period of the pattern is compiled.
    scanned = max(pattern.repeats - 1, 0) * pattern.period if m.scan_layers else 0
    compiled = len(tower) - scanned
    if compiled > MOST_COMPILED:
      field = "scan_layers" if not m.scan_layers else "moe.first"
      raise ConfigError(
        f"model.{field}",
        m.moe.first if m.scan_layers else False,
        f"{compiled} layers would be compiled one by one, and at most {MOST_COMPILED} may; must be "
        f"{'smaller' if m.scan_layers else True}",
      )


def weights(m: Config) -> Iterator[tuple[str, int]]:
  """Yields lower bounds of the numbers of weights, each with a key that multiplies it.

  An FFN or expert counts as two matrices; biases and norms do not count.

  Args:
    m: The section `model` of the config.

  Yields:
    `(dotted key, number of weights)`.
  """
  yield "model.vocab_size", (m.vocab_size + m.target_vocab_size) * m.d_model
  layers = has_experts(m)
  # A Brainformer has an entry for each sublayer of its block; other families have the entry "".
  for entry, layer_model in own_models(m).items():
    repeats = m.num_layers if entry else len(layers)
    attends = m.family != "lstm" and kind(entry or "attention") == "attention"
    if attends and m.attention != "latent":
      yield (
        "model.num_heads",
        repeats * 2 * layer_model.d_model * layer_model.num_heads * layer_model.head_dim,
      )
      yield (
        "model.num_kv_heads",
        repeats * 2 * layer_model.d_model * layer_model.num_kv_heads * layer_model.head_dim,
      )
    elif attends:
      yield (
        "model.num_heads",
        repeats
        * layer_model.num_heads
        * layer_model.latent.value_dim
        * (layer_model.latent.kv_rank + layer_model.d_model),
      )
    if m.family == "lstm":
      yield (
        "model.lstm_units",
        repeats * 4 * (layer_model.lstm_units or layer_model.d_model) * layer_model.d_model,
      )
    elif entry == "" or kind(entry) == "ffn":
      dense = repeats if entry else layers.count(False)
      yield "model.d_ff", dense * 2 * layer_model.d_model * layer_model.d_ff
    if layer_model.moe.num_experts and kind(entry or "moe") == "moe":
      sparse = repeats if entry else layers.count(True)
      yield (
        "model.moe.num_experts",
        sparse
        * layer_model.moe.num_experts
        * (2 * (layer_model.moe.latent_width or layer_model.d_model) * layer_model.moe.d_ff),
      )
      # Experts without an FFN have a column of the router each.
      for name in WITHOUT_FFN:
        yield f"model.moe.{name}", sparse * layer_model.moe[name] * layer_model.d_model
      yield (
        "model.moe.num_shared_experts",
        sparse
        * layer_model.moe.num_shared_experts
        * layer_model.d_model
        * 2
        * layer_model.moe.d_ff,
      )


def activations(config: Config) -> Iterator[tuple[str, int]]:
  """Yields the sizes of one layer's largest arrays, each with a key that multiplies it.

  The arrays are those of a microbatch and of a routing group.

  Args:
    config: A config with all sections.

  Yields:
    `(dotted key, number of values)`.
  """
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
    for name in WITHOUT_FFN:
      yield f"model.moe.{name}", max(rows * d.seq_len, size) * m.moe[name]
    yield "model.moe.soft_slots", m.moe.num_experts * m.moe.soft_slots * m.d_model
    yield (
      "model.moe.group_size" if m.moe.group_size else "model.moe.group_rows",
      size * max(m.d_model, m.moe.d_ff),
    )
