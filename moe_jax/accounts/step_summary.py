"""How the training step of a config computes what is large, in words."""

from __future__ import annotations

from moe_jax.layers.blocked_attention import uses_blocks
from moe_jax.options import Config


def step_summary(config: Config) -> str:
  """Returns the parts of a step that are not computed in the plain form, with a line for each.

  The header of a run shows these lines after those of `routing_summary`. The result is "" if all
  parts have the plain form.
  """
  lines = {"attention": _attention_words(config)}
  return "\n".join(f"{name:>9}: {words}" for name, words in lines.items() if words)


def _attention_words(config: Config) -> str:
  """Returns how attention is computed in rows that are long enough for blocks of queries."""
  m, d = config.model, config.data
  if m.family == "lstm":
    return ""
  rows = [d.seq_len] + [d.encoder_len] * (m.family == "encoder_decoder")
  long = sorted({row for row in rows if uses_blocks(row, m.attention_block)})
  if not long:
    return ""
  tokens = " and ".join(f"{row:,}" for row in long)
  return f"scores of {m.attention_block:,} queries at a time, in rows of {tokens} tokens"
