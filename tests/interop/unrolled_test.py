"""Tests the names of weights that do not depend on how layers are compiled."""

import pytest
import tiny

from moe_jax import sharding
from moe_jax.interop import unrolled

pytestmark = pytest.mark.unit


def names(tmp_path, **changes):
  config = tiny.config(tmp_path, **changes)
  found = unrolled.leaves(config, 264, sharding.make_mesh({"data": 1}))
  return {name: leaf.each for leaf in found for name in leaf.names}


def test_scans_do_not_change_the_names(tmp_path):
  # Catches a stretch whose layers are numbered from 0, a period whose second layer is taken for
  # the next repetition, and a bias that has a row for dense layers, too.
  changes = {
    "model__num_layers": 6,
    "model__moe__first": 1,
    "model__moe__every": 2,
    "model__moe__balancing__rule": "sign",
    "model__moe__balancing__rate": 0.1,
    "model__moe__router__name": "sigmoid_bias",
    "model__moe__router__sigmoid_bias__k": 2,
  }
  scanned = names(tmp_path, **changes)
  assert scanned == names(tmp_path, model__scan_layers=False, **changes)
  assert scanned["layer_3/ffn/up"] == (4, 16, 32) and scanned["layer_4/ffn/up"] == (16, 32)
  biases = [name for name in scanned if name.endswith(unrolled.BIAS)]
  assert biases == [f"layer_{i}/{unrolled.BIAS}" for i in (1, 3, 5)]


def test_layers_that_differ_in_attention(tmp_path):
  # Of seven layers, which all have experts, 2 and 5 are global, so that three repeat twice. Catches
  # a pattern of experts alone, and kinds of dense layers that count as layers with experts.
  changes = {
    "model__num_layers": 7,
    "model__moe__first": 1,
    "model__moe__every": 1,
    "model__global_every": 3,
    "model__moe__balancing__rule": "sign",
    "model__moe__balancing__rate": 0.1,
  }
  scanned = names(tmp_path, **changes)
  assert scanned == names(tmp_path, model__scan_layers=False, **changes)
  biases = [name for name in scanned if name.endswith(unrolled.BIAS)]
  assert biases == [f"layer_{i}/{unrolled.BIAS}" for i in range(1, 7)]


def test_towers_are_numbered_apart(tmp_path):
  # Catches a decoder that is unrolled by the encoder's pattern.
  found = names(
    tmp_path,
    model__family="encoder_decoder",
    data__objective="span_corruption",
    model__num_encoder_layers=2,
    model__num_layers=4,
    model__moe__first=1,
    model__moe__every=2,
    model__position="relative",
    model__relative_shared=True,
  )
  assert "encoder/layer_1/ffn/router" in found and "decoder/layer_3/ffn/router" in found
  assert "encoder/layer_2/ffn/up" not in found and "decoder/relative_bias" in found


def test_nested():
  # Catches a branch that replaces another one.
  assert unrolled.nested({("a", "b"): 1, ("a", "c"): 2}) == {"a": {"b": 1, "c": 2}}
