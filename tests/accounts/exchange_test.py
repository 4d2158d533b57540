"""Bytes of the exchange with experts, by hand."""

import pytest

from configs import base, gshard
from moe_jax import accounts

pytestmark = pytest.mark.unit


def config(**changes):
  c = base.get_config()
  c.update_from_flattened_dict(
    {
      "model.d_model": 8,
      "model.num_layers": 4,
      "data.seq_len": 16,
      "model.moe.first": 1,
      "model.moe.every": 2,
      "model.moe.num_experts": 4,
    }
    | changes
  )
  return c


def test_by_hand():
  # 2 layers with experts, 16 tokens of width 8 in float32, 2 assignments each, 4 trips:
  # 2*16*8*4*2*4 = 8192 bytes. Catches: all layers counted, one trip, K forgotten.
  assert accounts.exchange_bytes(config()) == 8192
  assert accounts.exchange_bytes(config(**{"model.remat": "full"})) == 8192 * 6 / 4
  assert accounts.exchange_bytes(config(**{"model.dtype": "bfloat16"})) == 8192 / 2


def test_slots_travel_filled_or_not():
  # f = 1.25 of S/E = 4 tokens is 5 slots an expert, 20 a group of 16 tokens. Catches: assignments
  # counted although slots are sent; a capacity of its own (expert choice) that is not read.
  capped = config(**{"model.moe.capacity_factor": 1.25})
  assert accounts.exchange_bytes(capped) == 8192 / 2 * 1.25
  chosen = config(
    **{
      "model.moe.router.name": "expert_choice",
      "model.moe.router.expert_choice.capacity_factor": 1.0,
    }
  )
  assert accounts.exchange_bytes(chosen) == 8192 / 2


def test_dense_models_send_nothing():
  # Catches: a division by no experts.
  assert accounts.exchange_bytes(config(**{"model.moe.num_experts": 0})) == 0


def test_encoders_send_what_they_read():
  # Catches: the decoder's length used for both; GShard's are equal, so that one is halved.
  c = gshard.get_config()
  both = accounts.exchange_bytes(c)
  c.data.encoder_len //= 2
  assert accounts.exchange_bytes(c) == pytest.approx(0.75 * both)


def test_a_capacity_rounds_by_each_stack_s_own_groups():
  # f S / E = 1.25 * 16 / 4 = 5 slots of the encoder's groups, 1.25 * 6 / 4 = 1.9 of the decoder's,
  # which is 2: 20 and 8 rows in each of 2 layers. Catches: the decoder's rounding for both, groups
  # of rows that are taken for one row.
  c = config(
    **{
      "model.family": "encoder_decoder",
      "data.encoder_len": 8,
      "data.seq_len": 3,
      "model.moe.group_rows": 2,
      "model.moe.capacity_factor": 1.25,
    }
  )
  assert accounts.exchange_bytes(c) == 2 * (20 + 8) / 2 * 8 * 4 * 4
