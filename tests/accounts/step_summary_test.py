"""The words about how a step computes what is large."""

import pytest
from changed import config

from moe_jax import accounts

pytestmark = pytest.mark.unit


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
  lines = dict(line.split(": ", 1) for line in accounts.step_summary(config(changes)).splitlines())
  assert lines.get("attention".rjust(9), "") == words
