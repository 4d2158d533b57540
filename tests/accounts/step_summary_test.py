"""The words about how a step computes what is large."""

import pytest
from changed import config

from moe_jax import accounts

pytestmark = pytest.mark.unit

BLOCKS = "scores of 256 queries at a time, in rows of 1,024 tokens"


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"data.seq_len": 1023}, ""),
    ({"data.seq_len": 1024}, "scores of 256 queries at a time, in rows of 1,024 tokens"),
    ({"data.seq_len": 1024, "model.attention_block": 0}, ""),
    ({"data.seq_len": 4096, "model.attention_block": 2048}, ""),
    ({"data.seq_len": 4096, "model.family": "lstm"}, ""),
    (
      {"data.seq_len": 1024, "data.encoder_len": 2048, "model.family": "encoder_decoder"},
      "scores of 256 queries at a time, in rows of 1,024 and 2,048 tokens",
    ),
  ],
  ids=str,
)
def test_attention_by_blocks_is_told(changes, words):
  # Catches blocks that are told where the layer computes a row at once, or the reverse.
  assert told(changes, "attention") == words


def told(changes, name):
  """Returns the words of a line, or "" without it."""
  text = accounts.step_summary(config(changes), 300)
  return dict(line.split(": ", 1) for line in text.splitlines()).get(name.rjust(9), "")


@pytest.mark.parametrize(
  "changes, words",
  [
    ({}, ""),
    ({"model.vocab_size": 16_383}, ""),
    ({"model.vocab_size": 16_384}, "of 8,192 of 16,384 entries at a time"),
    ({"model.logits_chunk": 100}, "of 100 of 300 entries at a time"),
    ({"model.vocab_size": 64_000, "model.target_vocab_size": 500}, ""),
    (
      {"model.vocab_size": 32_000, "train.teacher.workdir": "runs/teacher"},
      "of all 32,000 entries in training, because the teacher's are compared with them",
    ),
  ],
  ids=str,
)
def test_logits_by_chunks_are_told(changes, words):
  # Catches the vocabulary of the source in place of the target's, and a teacher that is forgotten.
  assert told(changes, "logits") == words


def test_the_rules_of_muon_are_told():
  # The model has one layer with D = 4, four heads of two, a dense FFN of 6, and 300 entries.
  # Catches weights that are counted for the other rule, and a rule without its names.
  small = {
    "model.d_model": 4,
    "model.num_layers": 1,
    "model.head_dim": 2,
    "model.d_ff": 6,
    "model.moe.num_experts": 0,
  }
  assert told(small, "optimizer") == ""
  assert told(small | {"optimizer.name": "muon"}, "optimizer") == (
    f"muon for {4 * 4 * 8 + 3 * 4 * 6} parameters (down, gate, key, output, query, up, value); "
    f"adamw for {300 * 4 + 3 * 4:,} parameters (embedding, scale)"
  )


@pytest.mark.parametrize(
  "changes, platform, words",
  [
    ({}, "tpu", "JAX's splash kernel, in rows of 1,024 tokens"),
    ({}, "gpu", BLOCKS),
    ({"model.attention_kernel": "blocks"}, "tpu", BLOCKS),
    ({"model.attention": "latent"}, "tpu", "JAX's splash kernel, in rows of 1,024 tokens"),
    (
      {"model.position": "relative"},
      "tpu",
      f"{BLOCKS}; not by the splash kernel: it has no biases",
    ),
    (
      {"model.position": "none", "model.family": "encoder_decoder", "data.encoder_len": 2048},
      "tpu",
      "JAX's splash kernel, in rows of 1,024 and 2,048 tokens; attention to the encoder by blocks",
    ),
  ],
  ids=str,
)
def test_the_kernel_is_told(changes, platform, words):
  # Catches blocks in place of the kernel without a reason, and a kernel on another platform.
  text = accounts.step_summary(config({"data.seq_len": 1024} | changes), 300, platform)
  assert text == f"attention: {words}"
