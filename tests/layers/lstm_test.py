"""Tests the LSTM against Flax's, its projection by hand, and where its state is reset."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn

from moe_jax.layers import Lstm

pytestmark = pytest.mark.numerics

B, L, D = 2, 5, 3


def made(units, projected=0, **options):
  """Returns (module, variables, input, positions), where each row is one document."""
  x = jax.random.normal(jax.random.key(1), (B, L, D))
  positions = jnp.tile(jnp.arange(L, dtype=jnp.int32), (B, 1))
  module = Lstm(units, projected, **options)
  return module, nn.unbox(module.init(jax.random.key(0), x, positions)), x, positions


def test_it_is_flax_s_lstm():
  # Catches exchanged gates, a bias that is added twice or to the wrong gate, and a state that is
  # one step late.
  module, variables, x, positions = made(4)
  params = variables["params"]
  assert {name: leaf.shape for name, leaf in params.items()} == {
    "input": (D, 4, 4),
    "recurrent": (4, 4, 4),
    "gate_bias": (4, 4),
  }
  np.testing.assert_array_equal(params["gate_bias"], np.repeat([[0], [1], [0], [0]], 4, axis=1))
  params = params | {"gate_bias": jax.random.normal(jax.random.key(2), (4, 4))}
  cell = {f"i{gate}": {"kernel": params["input"][:, i]} for i, gate in enumerate("ifgo")}
  cell |= {
    f"h{gate}": {"kernel": params["recurrent"][:, i], "bias": params["gate_bias"][i]}
    for i, gate in enumerate("ifgo")
  }
  theirs = nn.RNN(nn.OptimizedLSTMCell(4, name="cell")).apply({"params": {"cell": cell}}, x)
  np.testing.assert_allclose(module.apply({"params": params}, x, positions), theirs, atol=1e-6)


def test_a_projection_by_hand():
  # The next step reads r = P o tanh(c). Catches a projection of the output only, with which the
  # next step would read the unprojected memory.
  module, variables, x, positions = made(4, 2)
  p = {name: np.asarray(leaf, np.float64) for name, leaf in variables["params"].items()}
  assert p["recurrent"].shape == (2, 4, 4) and p["projection"].shape == (4, 2)

  def sigmoid(z):
    return 1 / (1 + np.exp(-z))

  c, r, expected = np.zeros((B, 4)), np.zeros((B, 2)), []
  for t in range(L):
    i, f, g, o = (
      np.asarray(x)[:, t] @ p["input"][:, n] + r @ p["recurrent"][:, n] + p["gate_bias"][n]
      for n in range(4)
    )
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    r = sigmoid(o) * np.tanh(c) @ p["projection"]
    expected.append(r)
  np.testing.assert_allclose(
    module.apply(variables, x, positions), np.stack(expected, axis=1), atol=1e-6
  )


@pytest.mark.parametrize("projected", [0, 2])
def test_nothing_crosses_the_start_of_a_document(projected):
  # Row 0 has documents of 2 and 3 tokens. Catches c or r that is kept, a reset that is one step
  # late, and a reset of all rows.
  module, variables, x, positions = made(4, projected)
  packed = positions.at[0].set(jnp.asarray([0, 1, 0, 1, 2]))
  y, whole = module.apply(variables, x, packed), module.apply(variables, x, positions)
  alone = module.apply(variables, x[:, 2:], positions[:, :3])
  np.testing.assert_allclose(y[0, 2:], alone[0], atol=1e-6)
  np.testing.assert_allclose(y[0, :2], whole[0, :2], atol=1e-6)
  np.testing.assert_allclose(y[1], whole[1], atol=1e-6)
  assert float(jnp.abs(y[0, 2:] - whole[0, 2:]).max()) > 1e-3
  row = tiny.quick_jit(jax.grad(lambda x: jnp.sum(module.apply(variables, x, packed)[0, 2:])))(x)[0]
  assert not np.any(row[:2]) and np.all(np.any(row[2:], axis=-1))


def test_the_memory_is_float32_in_a_bfloat16_model():
  # Catches a memory in bfloat16, which would lose small additions, and an output in float32.
  module, variables, x, positions = made(4, dtype=jnp.bfloat16)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
  jaxpr = jax.make_jaxpr(module.apply)(variables, x.astype(jnp.bfloat16), positions)
  scan = next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")
  carried = [v.aval for v in scan.params["jaxpr"].jaxpr.outvars[:2]]
  assert [v.dtype for v in carried] == [jnp.float32, jnp.bfloat16] and jaxpr.out_avals[
    0
  ].dtype == jnp.bfloat16
