"""The bytes that a step keeps for its backward pass."""

import pytest
from changed import config

from moe_jax import accounts

pytestmark = pytest.mark.unit

# Two dense layers with D = 16, L = 8 and V = 10.
SMALL = {
  "model.d_model": 16,
  "model.num_layers": 2,
  "model.num_heads": 2,
  "model.num_kv_heads": 2,
  "model.head_dim": 8,
  "model.d_ff": 32,
  "model.moe.num_experts": 0,
  "data.seq_len": 8,
}


def test_the_least_is_each_layers_input():
  # With remat "full" a layer keeps its input, which is 8 * 16 float32 per row. Besides, the loss
  # keeps some arrays of 8 x 10 and 8 x 16. Catches weights that are counted as activations, the
  # bytes of a batch in place of a row, and a remat that is not read.
  full, deeper = (
    accounts.activation_bytes(config(SMALL | {"model.remat": "full", "model.num_layers": n}), 10)
    for n in (2, 6)
  )
  assert deeper - full == 4 * (8 * 16 * 4)
  assert 2 * 8 * 16 * 4 < full < 12 * 8 * 16 * 4


def test_less_recomputation_keeps_more():
  # With remat "none" attention keeps scores of L x L per head. Catches policies that are exchanged.
  def saved(remat):
    return accounts.activation_bytes(config(SMALL | {"model.remat": remat}), 10)

  kept = {remat: saved(remat) for remat in ("full", "dots", "none")}
  assert kept["full"] < kept["dots"] < kept["none"]
  longer = accounts.activation_bytes(
    config(SMALL | {"model.remat": "none", "data.seq_len": 64}), 10
  )
  assert longer > 8 * kept["none"] + 2 * 2 * 4 * (64 * 64 - 8 * 64)


def test_groups_that_span_rows():
  # With groups of 12 tokens and rows of 8, three rows hold two groups. Catches a batch that does
  # not hold whole groups.
  c = config(SMALL | {"model.moe.num_experts": 4, "model.moe.d_ff": 16, "model.moe.group_size": 12})
  assert accounts.activation_bytes(c, 10) > 0


def test_an_encoder_and_its_decoder():
  # Catches an encoder's input that is missing or not counted.
  both = SMALL | {
    "model.family": "encoder_decoder",
    "model.position": "relative",
    "data.objective": "span_corruption",
  }
  short, long = (
    accounts.activation_bytes(config(both | {"data.encoder_len": n}), 200) for n in (8, 16)
  )
  assert 0 < short < long
