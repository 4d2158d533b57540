"""How the training step of a config computes what is large, in words."""

from __future__ import annotations

from collections import Counter, defaultdict

import jax
from flax import linen as nn

from moe_jax.assembly.models import abstract_variables, attention_kernel
from moe_jax.layers.blocked_attention import uses_blocks
from moe_jax.layers.splash_attention import obstacle
from moe_jax.models.output import uses_chunks
from moe_jax.options import Config
from moe_jax.training import muon
from moe_jax.training.weight_paths import keys


def step_summary(config: Config, vocab_size: int, platform: str = "cpu") -> str:
  """Returns the parts of a step that are not computed in the plain form, with a line for each.

  The header of a run shows these lines after those of `routing_summary`. The result is "" if all
  parts have the plain form.

  Args:
    config: A config with all sections.
    vocab_size: The size of the tokenizer's vocabulary, which counts if model.vocab_size is 0.
    platform: The platform of the devices that will run the step; those of the current mesh if there
      is one.
  """
  lines = {
    "attention": _attention_words(config, platform),
    "logits": _logits_words(config, vocab_size),
    "optimizer": _optimizer_words(config, vocab_size),
  }
  return "\n".join(f"{name:>9}: {words}" for name, words in lines.items() if words)


def _attention_words(config: Config, platform: str) -> str:
  """Returns how attention is computed in rows that are long enough for blocks of queries."""
  m, d = config.model, config.data
  if m.family == "lstm":
    return ""
  rows = [d.seq_len] + [d.encoder_len] * (m.family == "encoder_decoder")
  long = sorted({row for row in rows if uses_blocks(row, m.attention_block)})
  if not long:
    return ""
  tokens = " and ".join(f"{row:,}" for row in long)
  words = f"scores of {m.attention_block:,} queries at a time, in rows of {tokens} tokens"
  if attention_kernel(m, platform) == "blocks":
    return words
  reasons = {
    obstacle(
      row,
      m.num_heads if m.attention == "latent" else m.num_kv_heads,
      has_bias=m.position == "relative",
      has_sinks=m.sinks,
      has_dropout=m.dropout > 0 and m.family == "encoder_decoder",
    )
    for row in long
  }
  if reasons == {""}:
    other = "; attention to the encoder by blocks" if m.family == "encoder_decoder" else ""
    return f"JAX's splash kernel, in rows of {tokens} tokens{other}"
  return f"{words}; not by the splash kernel: {', '.join(sorted(reasons - {''}))}"


def _logits_words(config: Config, vocab_size: int) -> str:
  """Returns how the cross-entropy of a vocabulary that is large enough for chunks is computed."""
  m = config.model
  entries = m.target_vocab_size or m.vocab_size or vocab_size
  if not uses_chunks(entries, m.logits_chunk):
    return ""
  if config.train.teacher.workdir:
    return f"of all {entries:,} entries in training, because the teacher's are compared with them"
  return f"of {m.logits_chunk:,} of {entries:,} entries at a time"


def _optimizer_words(config: Config, vocab_size: int) -> str:
  """Returns how many weights get which rule of an optimizer that has two."""
  if config.optimizer.name != "muon":
    return ""
  params = nn.unbox(abstract_variables(config, vocab_size)["params"])
  sizes, names = Counter(), defaultdict(set)
  of_weights = jax.tree.leaves(muon.rules(params))
  leaves = jax.tree_util.tree_leaves_with_path(params)
  for (path, leaf), rule in zip(leaves, of_weights, strict=True):
    sizes[rule] += leaf.size
    names[rule].add(keys(path)[-1])
  return "; ".join(
    f"{rule} for {sizes[rule]:,} parameters ({', '.join(sorted(names[rule]))})"
    for rule in sorted(names, reverse=True)
  )
