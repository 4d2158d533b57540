"""Tests the changes that are suggested if a step does not fit."""

import types

import pytest
import tiny

from moe_jax import accounts
from moe_jax.dryrun import remedies
from moe_jax.dryrun.machine.chips import GIB

pytestmark = pytest.mark.unit


def found(config, sizes, expected):
  return remedies.remedies(config, types.SimpleNamespace(shape=sizes), 264, expected)


def test_the_most_effective_first(tmp_path):
  # Recomputation saves nearly all of 100 GiB of activations, microbatches save half of it, and fsdp
  # instead of data saves half of 30 GiB. Catches remedies in an arbitrary order, and a mesh for
  # another number of devices.
  config = tiny.config(tmp_path, train__batch_size=16)
  sizes = {"data": 2, "fsdp": 1, "expert": 2, "tensor": 1}
  held = {
    "weights": 10.0 * GIB,
    "gradients": 10.0 * GIB,
    "optimizer state": 10.0 * GIB,
    "activations": 100.0 * GIB,
  }
  said = found(config, sizes, held)
  assert [words.split(" ")[0] for words in said] == [
    "--config.model.remat=full",
    "--config.train.accumulate_steps=2",
    "--mesh=fsdp=2,expert=2",
  ]
  assert "(about 50 GiB less)" in said[1] and "(about 15 GiB less)" in said[2]


def test_the_fewest_microbatches_that_divide_the_rows(tmp_path):
  # Nine rows on a device are split into three parts, which saves two thirds. Catches a search for
  # halves only, which nine rows do not have.
  config = tiny.config(
    tmp_path, train__batch_size=9 * 4 * 2, train__accumulate_steps=2, model__remat="full"
  )
  held = {
    "weights": 1.0 * GIB,
    "gradients": 1.0 * GIB,
    "optimizer state": 1.0 * GIB,
    "activations": 30.0 * GIB,
  }
  said = found(config, {"data": 1, "fsdp": 2, "expert": 2, "tensor": 1}, held)
  assert "--config.train.accumulate_steps=6 (about 20 GiB less)" in said


def test_what_does_not_help_is_not_proposed(tmp_path):
  # Catches a suggestion of remat=full if it is on, of microbatches with less than one row on a
  # device, and of the current mesh.
  config = tiny.config(tmp_path, train__batch_size=2, model__remat="full")
  row = accounts.activation_bytes(config, 264)
  held = {
    "weights": 1.0 * GIB,
    "gradients": 1.0 * GIB,
    "optimizer state": 1.0 * GIB,
    "activations": row,
  }
  assert found(config, {"data": 1, "fsdp": 2, "expert": 1, "tensor": 1}, held) == []


def test_changes_are_made_to_a_copy(tmp_path):
  # Catches a search whose candidates share one config.
  config = tiny.config(tmp_path)
  other = remedies.changed(config, {"model.remat": "full", "mesh.data": 4})
  assert (other.model.remat, other.mesh.data) == ("full", 4) and (
    config.model.remat,
    config.mesh.data,
  ) == ("none", 1)
