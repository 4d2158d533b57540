"""The bytes of the exchange with experts agree with values that are computed by hand."""

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
  # There are 2 layers with experts, 16 tokens of width 8 in float32, 2 assignments per token and 4
  # trips, which are 2*16*8*4*2*4 = 8192 bytes. Catches dense layers that are counted, a single
  # trip, and a missing K.
  assert accounts.exchange_bytes(config()) == 8192
  assert accounts.exchange_bytes(config(**{"model.remat": "full"})) == 8192 * 6 / 4
  assert accounts.exchange_bytes(config(**{"model.remat": "exchanges"})) == 8192
  assert accounts.exchange_bytes(config(**{"model.dtype": "bfloat16"})) == 8192 / 2
  assert accounts.exchange_bytes(config(**{"model.moe.latent_width": 2})) == 8192 / 4


def test_slots_travel_filled_or_not():
  # f = 1.25 of S/E = 4 tokens makes 5 slots per expert, and 20 per group of 16 tokens. Catches
  # assignments that are counted although slots are sent, and a router's own capacity (expert
  # choice) that is not read.
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
  # Catches a division by 0 experts.
  assert accounts.exchange_bytes(config(**{"model.moe.num_experts": 0})) == 0


def test_encoders_send_what_they_read():
  # GShard's encoder and decoder have equal lengths, so the encoder's is halved here. Catches the
  # decoder's length that is used for both.
  c = gshard.get_config()
  both = accounts.exchange_bytes(c)
  c.data.encoder_len //= 2
  assert accounts.exchange_bytes(c) == pytest.approx(0.75 * both)


def test_a_capacity_rounds_by_each_stack_s_own_groups():
  # The encoder's groups have f S / E = 1.25 * 16 / 4 = 5 slots per expert, and the decoder's have
  # 1.25 * 6 / 4 = 1.9, which is rounded to 2. These are 20 and 8 rows in each of 2 layers. Catches
  # the decoder's rounding for both, and groups of several rows that are taken for one row.
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
