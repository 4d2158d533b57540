"""Tests that the three forms of the experts agree with their definition in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dispatch import ExpertFunction
from moe_jax.experts import ACTIVATIONS, Experts, activate, is_gated

pytestmark = pytest.mark.unit

E, D, F, N = 3, 4, 6, 5


def make(activation, ffn_bias="none", key=0):
  up, down, gate, bias = (
    jax.random.normal(k, s)
    for k, s in zip(
      jax.random.split(jax.random.key(key), 4),
      [(E, D, F), (E, F, D), (E, D, F), (E, F)],
      strict=True,
    )
  )
  return Experts(
    up=up,
    down=down,
    gate=gate if is_gated(activation) else None,
    activation=activation,
    hidden_bias=None if ffn_bias == "none" else bias,
    ffn_bias=ffn_bias,
  )


def by_hand(experts, e, rows):
  """Returns the output of expert `e` in plain NumPy, with activations from their definitions."""
  up = rows @ np.asarray(experts.up[e])

  def gelu(v):
    return 0.5 * v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3)))

  def silu(v):
    return v / (1 + np.exp(-v))

  def relu(v):
    return np.maximum(v, 0)

  def clamped(v):
    return np.minimum(v, 7) / (1 + np.exp(-1.702 * np.minimum(v, 7)))

  functions = {"relu": relu, "reglu": relu, "gelu": gelu, "geglu": gelu, "swiglu": silu}
  function = (functions | {"clamped_swiglu": clamped})[experts.activation]
  if experts.activation == "clamped_swiglu":
    up = np.clip(up, -7, 7) + 1
  hidden = (
    function(rows @ np.asarray(experts.gate[e])) * up
    if is_gated(experts.activation)
    else function(up)
  )
  hidden = hidden + experts.hidden_bias[e] if experts.ffn_bias == "additive" else hidden
  hidden = hidden * experts.hidden_bias[e] if experts.ffn_bias == "multiplicative" else hidden
  return hidden @ np.asarray(experts.down[e])


BIASED = [
  ("relu", "additive"),
  ("swiglu", "additive"),
  ("gelu", "multiplicative"),
  ("geglu", "multiplicative"),
]


@pytest.mark.parametrize(
  "activation, ffn_bias", [(activation, "none") for activation in ACTIVATIONS] + BIASED
)
def test_all_forms_equal_the_definition(activation, ffn_bias):
  # Catches up and gate swapped, the activation of the wrong product, weights of another expert, and
  # a bias before the activation.
  experts, x = make(activation, ffn_bias), jax.random.normal(jax.random.key(9), (E, N, D))
  expected = np.stack([by_hand(experts, e, np.asarray(x[e])) for e in range(E)])
  np.testing.assert_allclose(experts.buffers(x), expected, rtol=1e-4, atol=1e-5)
  slices = [jax.tree.map(lambda leaf, e=e: leaf[e], experts.weights) for e in range(E)]
  chunked = jnp.stack([experts.output(w, experts.hidden(w, x[e])) for e, w in enumerate(slices)])
  np.testing.assert_allclose(chunked, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation, ffn_bias", [("relu", "none"), ("swiglu", "none"), *BIASED])
def test_ragged_groups_with_an_idle_expert(activation, ffn_bias):
  # Catches group sizes that are read as boundaries, an empty group that shifts the next one, and
  # the bias of another expert.
  experts, rows = make(activation, ffn_bias), jax.random.normal(jax.random.key(9), (5, D))
  actual = experts.ragged(rows, jnp.array([2, 0, 3]))
  expected = np.concatenate(
    [by_hand(experts, 0, np.asarray(rows[:2])), by_hand(experts, 2, np.asarray(rows[2:]))]
  )
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_weights_are_cast_to_the_rows_dtype_and_gradients_are_not():
  # Catches float32 matmuls with bfloat16 activations, and gradients that are rounded to bfloat16.
  experts, x = make("swiglu", "additive"), jnp.ones((E, N, D), jnp.bfloat16)
  assert experts.buffers(x).dtype == jnp.bfloat16
  grads = jax.grad(lambda experts: experts.buffers(x).astype(jnp.float32).sum())(experts)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(grads))
  rows = experts.ragged(x[0], jnp.array([N, 0, 0]))
  assert rows.dtype == jnp.bfloat16


def test_protocol_and_gating():
  # Catches a missing form that the dispatchers call, and a third matrix in an FFN that is not
  # gated.
  assert isinstance(make("gelu"), ExpertFunction)
  assert [is_gated(a) for a in ("gelu", "relu", "geglu", "swiglu")] == [False, False, True, True]
  assert set(make("gelu").weights) == {"up", "down"} and set(make("geglu").weights) == {
    "up",
    "down",
    "gate",
  }
  assert set(make("gelu", "additive").weights) == {"up", "down", "hidden_bias"}
  np.testing.assert_allclose(activate("relu", {"up": jnp.array([-1.0, 2.0])}), [0.0, 2.0])


def test_clamped_swiglu_by_hand():
  # A gate of 9 counts as 7, of which sigmoid(11.9) is 0.99999, and one of -9 stays. An up of -8
  # counts as -7, and 1 is added. Beyond the limits the derivatives are 0. Catches a lower limit of
  # the gate, a limit after the product, and an up without the 1.
  gate, up = jnp.asarray([9.0, 1.0, -1.0, -9.0]), jnp.asarray([-8.0, 0.5, 8.0, 0.0])

  def hidden(gate, up):
    return activate("clamped_swiglu", {"gate": gate, "up": up})

  def swish(v):
    return v / (1 + np.exp(-1.702 * v))

  expected = [-6 * swish(7), 1.5 * swish(1), 8 * swish(-1), swish(-9)]
  np.testing.assert_allclose(hidden(gate, up), expected, rtol=1e-5)
  by_gate, by_up = jax.grad(lambda *a: jnp.sum(hidden(*a)), argnums=(0, 1))(gate, up)
  assert by_gate[0] == 0 and by_up[0] == by_up[2] == 0
  np.testing.assert_allclose(by_up[1], swish(1), rtol=1e-5)
  sigmoid = 1 / (1 + np.exp(-1.702))
  np.testing.assert_allclose(by_gate[1], 1.5 * sigmoid * (1 + 1.702 * (1 - sigmoid)), rtol=1e-5)
