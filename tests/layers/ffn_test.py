"""The dense FFN against its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn

from moe_jax.experts import ACTIVATIONS, is_gated
from moe_jax.layers import Aux, DenseFfn, LayerContext

pytestmark = pytest.mark.unit

FORMULAS = {"gelu": jax.nn.gelu, "relu": lambda x: jnp.maximum(x, 0), "geglu": jax.nn.gelu,
            "swiglu": lambda x: x / (1 + jnp.exp(-x))}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_formula(activation):
  # Catches: gate and up exchanged; a gate where there should be none.
  x = jax.random.normal(jax.random.key(0), (2, 3, 8))
  ids = jnp.ones((2, 3), jnp.int32)
  layer = DenseFfn(d_ff=16, activation=activation)
  (y, aux), variables = tiny.quick_jit(layer.init_with_output)(jax.random.key(1), x, LayerContext(ids, ids, ids))
  w = nn.unbox(variables)["params"]
  f = FORMULAS[activation]
  hidden = f(x @ w["gate"]) * (x @ w["up"]) if is_gated(activation) else f(x @ w["up"])
  np.testing.assert_allclose(y, hidden @ w["down"], atol=1e-5)
  assert aux == Aux() and ("gate" in w) == is_gated(activation)
