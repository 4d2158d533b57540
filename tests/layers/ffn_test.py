"""Tests the dense FFN against its formula, and the weights of experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn

from moe_jax.experts import ACTIVATIONS, is_gated
from moe_jax.layers import Aux, DenseFfn, LayerContext
from moe_jax.layers.ffn import experts

pytestmark = pytest.mark.unit

FORMULAS = {
  "gelu": jax.nn.gelu,
  "relu": lambda x: jnp.maximum(x, 0),
  "reglu": lambda x: jnp.maximum(x, 0),
  "geglu": jax.nn.gelu,
  "swiglu": lambda x: x / (1 + jnp.exp(-x)),
  "clamped_swiglu": lambda x: jnp.minimum(x, 7) / (1 + jnp.exp(-1.702 * jnp.minimum(x, 7))),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_formula(activation):
  # Catches an exchange of gate and up, and a gate where there should be none.
  # Some inputs are so large that limits of activations are exceeded.
  x = 5 * jax.random.normal(jax.random.key(0), (2, 3, 8))
  ids = jnp.ones((2, 3), jnp.int32)
  layer = DenseFfn(d_ff=16, activation=activation)
  (y, aux), variables = tiny.quick_jit(layer.init_with_output)(
    jax.random.key(1), x, LayerContext(ids, ids, ids)
  )
  w = nn.unbox(variables)["params"]
  f = FORMULAS[activation]
  up = x @ w["up"]
  if activation == "clamped_swiglu":
    assert jnp.abs(up).max() > 7
    up = jnp.clip(up, -7, 7) + 1
  hidden = f(x @ w["gate"]) * up if is_gated(activation) else f(up)
  np.testing.assert_allclose(y, hidden @ w["down"], rtol=1e-5, atol=1e-4)
  assert aux == Aux() and set(w) == {"up", "down"} | ({"gate"} if is_gated(activation) else set())


def test_biases_of_all_products():
  # Catches a bias after the activation, one that is missing or exchanged, and one that is not 0 at
  # first.
  x = jax.random.normal(jax.random.key(0), (2, 3, 8))
  ids = jnp.ones((2, 3), jnp.int32)
  layer = DenseFfn(d_ff=16, activation="swiglu", biases=True)
  context = LayerContext(ids, ids, ids)
  w = nn.unbox(layer.init(jax.random.key(1), x, context))["params"]
  shapes = {name: w[f"{name}_bias"].shape for name in ("up", "gate", "down")}
  assert shapes == {"up": (16,), "gate": (16,), "down": (8,)} and len(w) == 6
  assert not any(np.any(w[f"{name}_bias"]) for name in shapes)
  w |= {f"{name}_bias": jnp.arange(shape[0]) / 8 for name, shape in shapes.items()}
  gate, up = (x @ w[name] + w[f"{name}_bias"] for name in ("gate", "up"))
  wanted = (FORMULAS["swiglu"](gate) * up) @ w["down"] + w["down_bias"]
  np.testing.assert_allclose(layer.apply({"params": w}, x, context)[0], wanted, atol=1e-5)


@pytest.mark.parametrize("ffn_bias", ["additive", "multiplicative"])
def test_a_bias_on_hidden_units(ffn_bias):
  # Catches a bias before the activation or after the output projection, and a bias that has an
  # effect at initialisation, where it must be 0 or 1.
  x = jax.random.normal(jax.random.key(0), (2, 3, 8))
  ids = jnp.ones((2, 3), jnp.int32)
  context = LayerContext(ids, ids, ids)
  plain, layer = (
    DenseFfn(d_ff=16, activation="relu", ffn_bias=kind) for kind in ("none", ffn_bias)
  )
  w, without = (
    nn.unbox(one.init(jax.random.key(1), x, context))["params"] for one in (layer, plain)
  )
  np.testing.assert_array_equal(
    layer.apply({"params": w}, x, context)[0], plain.apply({"params": without}, x, context)[0]
  )
  assert w["hidden_bias"].shape == (16,)
  bias = jax.random.normal(jax.random.key(2), (16,))
  y, _ = layer.apply({"params": w | {"hidden_bias": bias}}, x, context)
  hidden = jnp.maximum(x @ w["up"], 0)
  hidden = hidden + bias if ffn_bias == "additive" else hidden * bias
  np.testing.assert_allclose(y, hidden @ w["down"], atol=1e-5)


class Three(nn.Module):
  """Three experts with model width 4 and hidden width 6."""

  ffn_bias: str = "none"
  activation: str = "swiglu"
  biases: bool = False

  @nn.compact
  def __call__(self):
    return experts(self, 3, 4, 6, self.activation, self.ffn_bias, 0.5, self.biases)


def test_weights_of_experts():
  # Catches weights that are created in another order, which would change every model, a bias
  # without an axis of experts, and an output projection that is not scaled.
  made, variables = Three("multiplicative").init_with_output(jax.random.key(0))
  boxes = variables["params"]
  assert {name: box.names for name, box in boxes.items()} == {
    "down": ("expert", "mlp", "embed"),
    "up": ("expert", "embed", "mlp"),
    "gate": ("expert", "embed", "mlp"),
    "hidden_bias": ("expert", "mlp"),
  }
  assert list(boxes) == ["down", "up", "gate", "hidden_bias"]
  assert (
    made.ffn_bias == "multiplicative"
    and made.hidden_bias.shape == (3, 6)
    and np.all(made.hidden_bias == 1)
  )
  assert float(jnp.std(made.down)) < 0.75 * float(jnp.std(made.up))
  plain = nn.unbox(Three().init(jax.random.key(0)))["params"]
  for name, weight in plain.items():
    np.testing.assert_array_equal(weight, boxes[name].value)


def test_biases_of_experts():
  # Catches biases with an effect at initialisation, a bias of a gate that is not there, and other
  # matrices than without biases.
  plain = nn.unbox(Three().init(jax.random.key(0)))["params"]
  made, variables = Three(biases=True).init_with_output(jax.random.key(0))
  boxes = variables["params"]
  assert {name: box.names for name, box in boxes.items() if name not in plain} == {
    "up_bias": ("expert", "mlp"),
    "gate_bias": ("expert", "mlp"),
    "down_bias": ("expert", "embed"),
  }
  assert made.up_bias.shape == made.gate_bias.shape == (3, 6) and made.down_bias.shape == (3, 4)
  assert not any(np.any(boxes[name].value) for name in boxes.keys() - plain.keys())
  for name, weight in plain.items():
    np.testing.assert_array_equal(weight, boxes[name].value)
  ungated = Three(activation="relu", biases=True).init(jax.random.key(0))["params"]
  assert set(ungated) == {"up", "down", "up_bias", "down_bias"}
