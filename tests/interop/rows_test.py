"""Tests the operations between published tensors and our weights, and the expansion of rows."""

import numpy as np
import pytest

from moe_jax.interop import rows
from moe_jax.interop.rows import SAME, TRANSPOSE, Row

pytestmark = pytest.mark.unit

OPS = {
  "same": (SAME, (3, 4), [(3, 4)]),
  "transpose": (TRANSPOSE, (3, 4), [(4, 3)]),
  "transposed stack": (TRANSPOSE, (2, 3, 4), [(2, 4, 3)]),
  "heads in": (rows.heads_in(2), (6, 5), [(5, 2, 3)]),
  "heads out": (rows.heads_out(2), (5, 6), [(2, 3, 5)]),
  "heads bias": (rows.heads_bias(2), (6,), [(2, 3)]),
  "two parts": (rows.parts(TRANSPOSE, (2, 3), -1), (5, 4), [(4, 2), (4, 3)]),
  "halves": (rows.halves(rows.heads_in(2), 4), (10, 3), [(3, 2, 5)]),
  "flat experts": (rows.experts_flat(2, TRANSPOSE), (6, 5), [(2, 5, 3)]),
  "flat experts, not transposed": (rows.experts_flat(2, SAME), (6, 5), [(2, 3, 5)]),
}


@pytest.mark.parametrize("name", OPS)
def test_operations_have_an_exact_inverse(name):
  # Catches a reshape before a transpose instead of after it, and a shape for the message of a wrong
  # tensor that is not the tensor's.
  op, theirs, ours = OPS[name]
  tensor = np.arange(np.prod(theirs)).reshape(theirs)
  weights = op.split(tensor)
  assert [weight.shape for weight in weights] == ours
  assert op.shape(*ours) == theirs
  np.testing.assert_array_equal(op.join(*weights), tensor)


def test_heads_are_blocks_of_rows():
  # Catches heads that are interleaved: both orders would survive the way there and back.
  (weight,) = rows.heads_in(2).split(np.arange(6)[:, None])
  np.testing.assert_array_equal(weight, [[[0, 1, 2], [3, 4, 5]]])
  (weight,) = rows.heads_out(2).split(np.arange(6)[None])
  np.testing.assert_array_equal(weight[..., 0], [[0, 1, 2], [3, 4, 5]])


def test_halves_gather_even_features_first():
  # Catches a permutation that is used in place of its inverse, which at four features is another.
  (weight,) = rows.halves(SAME, 6).split(np.arange(8)[None])
  np.testing.assert_array_equal(weight, [[0, 1, 2, 4, 6, 3, 5, 7]])


def test_rows_are_expanded_over_their_layers_and_experts():
  # Catches experts of dense layers, and layers of the decoder that are counted for the encoder.
  table = [
    Row("enc.{l}.{e}", "encoder/layer_{l}/up", SAME, True),
    Row("dec.{l}", "decoder/layer_{l}/up", SAME, False),
    Row("embed", "embedding", SAME),
  ]
  stacks = {"encoder/": [False, True], "decoder/": [False, True, False]}
  bound = list(rows.bindings(table, stacks, 2))
  assert [(each.theirs, each.ours[0], each.expert) for each in bound] == [
    ("enc.1.0", "encoder/layer_1/up", 0),
    ("enc.1.1", "encoder/layer_1/up", 1),
    ("dec.0", "decoder/layer_0/up", None),
    ("dec.2", "decoder/layer_2/up", None),
    ("embed", "embedding", None),
  ]
