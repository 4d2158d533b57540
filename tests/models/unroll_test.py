"""An unrolled model is compared with the scanned one."""

import jax
import numpy as np
import pytest
import tiny
from decoder_inputs import make, packed, run

from moe_jax.models.unroll import unroll

pytestmark = pytest.mark.numerics


@pytest.mark.parametrize(
  "changes",
  [
    # D M M M: one layer comes before the repetition.
    {"num_layers": 4, "moe__first": 1, "moe__every": 1},
    {"family": "brainformer", "num_layers": 2, "block": ("attention", "ffn", "moe")},
  ],
  ids=["decoder", "brainformer"],
)
def test_an_unrolled_model_computes_the_same_function(changes):
  # Catches layers in another order, a layer before the repetition that is counted twice, and
  # weights of the wrong repetition.
  model, batch = make(**changes), packed([[3, 5], [8]])
  variables = tiny.weights(model, *batch)
  assert "repeats" in variables["params"]
  apart, apart_variables = unroll(model, variables)
  shapes = jax.eval_shape(lambda key: apart.init(key, *batch, train=False), jax.random.key(0))
  assert jax.tree.structure(apart_variables) == jax.tree.structure(tiny.nn.unbox(shapes))
  expected, actual = run(model, variables, batch)[0], run(apart, apart_variables, batch)[0]
  np.testing.assert_allclose(actual, expected, atol=1e-5)
  # A model without repetitions stays as it is.
  jax.tree.map(np.testing.assert_array_equal, unroll(apart, apart_variables)[1], apart_variables)
