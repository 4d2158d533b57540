"""Tests that the three forms of the experts agree with their definition in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dispatch import ExpertFunction
from moe_jax.experts import ACTIVATIONS, Experts, activate, is_gated

pytestmark = pytest.mark.unit

E, D, F, N = 3, 4, 6, 5


def make(activation, ffn_bias="none", biases=False, key=0):
  up, down, gate, bias, up_bias, gate_bias, down_bias = (
    jax.random.normal(jax.random.fold_in(jax.random.key(key), i), s)
    for i, s in enumerate([(E, D, F), (E, F, D), (E, D, F), (E, F), (E, F), (E, F), (E, D)])
  )
  return Experts(
    up=up,
    down=down,
    gate=gate if is_gated(activation) else None,
    activation=activation,
    hidden_bias=None if ffn_bias == "none" else bias,
    ffn_bias=ffn_bias,
    up_bias=up_bias if biases else None,
    gate_bias=gate_bias if biases and is_gated(activation) else None,
    down_bias=down_bias if biases else None,
  )


def by_hand(experts, e, rows):
  """Returns the output of expert `e` in plain NumPy, with activations from their definitions."""

  def product(rows, name):
    bias = getattr(experts, f"{name}_bias")
    return rows @ np.asarray(getattr(experts, name)[e]) + (0 if bias is None else bias[e])

  up = product(rows, "up")

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
  hidden = function(product(rows, "gate")) * up if is_gated(experts.activation) else function(up)
  hidden = hidden + experts.hidden_bias[e] if experts.ffn_bias == "additive" else hidden
  hidden = hidden * experts.hidden_bias[e] if experts.ffn_bias == "multiplicative" else hidden
  return product(hidden, "down")


BIASED = [
  ("relu", "additive", False),
  ("swiglu", "additive", False),
  ("gelu", "multiplicative", False),
  ("geglu", "multiplicative", True),
  ("relu", "none", True),
  ("clamped_swiglu", "none", True),
]


@pytest.mark.parametrize(
  "activation, ffn_bias, biases",
  [(activation, "none", False) for activation in ACTIVATIONS] + BIASED,
)
def test_all_forms_equal_the_definition(activation, ffn_bias, biases):
  # Catches up and gate swapped, the activation of the wrong product, weights of another expert, a
  # bias of hidden units before the activation, and one of a product behind it.
  experts, x = make(activation, ffn_bias, biases), jax.random.normal(jax.random.key(9), (E, N, D))
  expected = np.stack([by_hand(experts, e, np.asarray(x[e])) for e in range(E)])
  np.testing.assert_allclose(experts.buffers(x), expected, rtol=1e-4, atol=1e-5)
  slices = [jax.tree.map(lambda leaf, e=e: leaf[e], experts.weights) for e in range(E)]
  chunked = jnp.stack([experts.output(w, experts.hidden(w, x[e])) for e, w in enumerate(slices)])
  np.testing.assert_allclose(chunked, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  "activation, ffn_bias, biases", [("relu", "none", False), ("swiglu", "none", False), *BIASED]
)
def test_ragged_groups_with_an_idle_expert(activation, ffn_bias, biases):
  # Catches group sizes that are read as boundaries, an empty group that shifts the next one, and
  # the bias of another expert.
  experts, rows = make(activation, ffn_bias, biases), jax.random.normal(jax.random.key(9), (5, D))
  actual = experts.ragged(rows, jnp.array([2, 0, 3]))
  expected = np.concatenate(
    [by_hand(experts, 0, np.asarray(rows[:2])), by_hand(experts, 2, np.asarray(rows[2:]))]
  )
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_rows_after_the_last_group_have_no_gradient():
  # Three of five rows belong to an expert. Catches the last expert's biases on rows of nobody,
  # whose gradients then hold whatever stands there.
  experts = make("clamped_swiglu", "additive", biases=True)
  rows, sizes = jax.random.normal(jax.random.key(9), (5, D)), jnp.array([2, 0, 1])

  def f(experts, counted):
    return jnp.sum(experts.ragged(rows, sizes)[:counted])

  used, all_rows = (jax.grad(f)(experts, counted).weights for counted in (3, 5))
  for name in ("hidden_bias", "up_bias", "gate_bias", "down_bias"):
    np.testing.assert_array_equal(used[name], all_rows[name])
    assert np.any(used[name][2]) and not np.any(used[name][1])


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
  assert set(make("gelu", biases=True).weights) == {"up", "down", "up_bias", "down_bias"}
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
