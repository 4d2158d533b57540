"""Tests memory, FLOPs and exchanged bytes by arithmetic against hand-worked ones."""

import jax
import pytest
import tiny

from moe_jax import accounts, assembly, sharding
from moe_jax.dryrun import ideal
from moe_jax.training import optimizers
from moe_jax.training import state as states

pytestmark = pytest.mark.unit


def state_of(config, mesh):
  model, (optimizer, _) = (
    assembly.model(config, 264, mesh),
    optimizers.make(optimizers.OptimizerOptions.of(config.optimizer), 6),
  )
  return states.create(mesh, model, optimizer, 0, config.data.seq_len, config.train.batch_size)[0]


def test_what_is_held_is_divided_by_those_who_share_it(tmp_path):
  # AdamW keeps two floats for each weight, and two counters. Catches shards that are not counted,
  # and a batch that is not split.
  config = tiny.config(tmp_path, train__batch_size=8)
  one = sharding.make_mesh({"data": 1})
  whole = ideal.memory(config, state_of(config, one), 264, one)
  total, _ = accounts.parameter_counts(config, 264)
  assert whole["weights"] == whole["gradients"] == 4 * total
  assert whole["optimizer state"] == 8 * total + 8
  assert whole["activations"] == 8 * accounts.activation_bytes(config, 264)

  config = tiny.config(
    tmp_path, train__batch_size=8, train__accumulate_steps=2, mesh__data=1, mesh__fsdp=2
  )
  two = sharding.make_mesh({"fsdp": 2})
  half = ideal.memory(config, state_of(config, two), 264, two)
  # Norms and the router's bias are not split.
  assert 0.5 <= half["weights"] / whole["weights"] < 0.6
  assert half["activations"] == pytest.approx(whole["activations"] / 4)


def test_a_steps_flops_and_tokens(tmp_path):
  # Catches FLOPs of the forward pass alone, and the tokens of a row instead of a batch.
  config = tiny.config(tmp_path)
  assert ideal.step_tokens(config) == 4 * 32
  assert ideal.step_flops(config, 264) == 3 * accounts.flops_per_token(config, 264) * 128


def test_what_stays_at_home_is_not_sent(tmp_path):
  # Each of 4 devices that share the experts keeps a quarter. Catches rows that are all counted as
  # sent, and rows of other devices that are counted.
  config = tiny.config(tmp_path)
  sizes = {"data": 1, "fsdp": 1, "expert": 4, "tensor": 1}
  rows = 4 / ideal.batch_shards(sizes)
  assert ideal.exchange(config, sizes) == pytest.approx(
    0.75 * rows * accounts.exchange_bytes(config)
  )
  assert ideal.exchange(config, sizes | {"expert": 1}) == 0


def test_logits_are_shared_by_the_vocabularys_devices(tmp_path):
  # Catches logits that are counted completely on each of the devices that share them.
  config = tiny.config(tmp_path)
  whole, quarter = accounts.activation_bytes(config, 264), accounts.activation_bytes(config, 264, 4)
  assert 32 * 264 * 4 <= (whole - quarter) / 0.75 <= 4 * 32 * 264 * 4
  assert jax.numpy.isfinite(whole)
