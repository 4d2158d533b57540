"""Tests the learned inputs of a router: its logits and other fields."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_jax.layers import NETWORKS, GateOptions
from moe_jax.layers.gate import adjust, expert_scale, learned, scale_gates
from moe_jax.routing import RoutingPlan

pytestmark = pytest.mark.unit

X = jax.random.normal(jax.random.key(0), (2, 3, 5))
FIELDS = ("noise_std", "primary", "primary_noise_std", "threshold")


class Owner(nn.Module):
  network: str = "linear"
  scale: float = 0.1
  fields: tuple[str, ...] = ()

  @nn.compact
  def __call__(self, x):
    return NETWORKS[self.network](self, x, 4, self.scale), learned(
      self, x, self.fields, 4, 2, self.scale
    )


def _run(**options):
  owner = Owner(**options)
  variables = nn.unbox(owner.init(jax.random.key(1), X))
  return owner, variables["params"], owner.apply(variables, X)


def test_linear():
  # Catches a bias and a transposed matrix.
  _, p, (logits, fields) = _run()
  assert set(p) == {"router"} and fields == {}
  np.testing.assert_allclose(logits, np.einsum("gsd,de->gse", X, p["router"]), rtol=1e-5)


def test_tanh_has_a_hidden_layer_of_as_many_units_as_experts():
  # LLaMA-MoE has tanh(x W1) W2 with W1 [D, E] and W2 [E, E]. Catches a tanh of the logits, and a
  # hidden layer of width D.
  _, p, (logits, _) = _run(network="tanh")
  assert p["router_hidden"].shape == (5, 4) and p["router"].shape == (4, 4)
  np.testing.assert_allclose(logits, np.tanh(X @ p["router_hidden"]) @ p["router"], rtol=1e-5)


def test_product_keys_are_sums_of_two_halves():
  # Expert 2 i + j has the sum of key i of the first half and key j of the second. Catches halves
  # that are swapped, and a matrix with a column for each expert.
  _, p, (logits, _) = _run(network="product_keys")
  assert p["router"].shape == (5, 4)
  keys = np.einsum("gsd,de->gse", X, p["router"])
  expected = [keys[..., i] + keys[..., 2 + j] for i in range(2) for j in range(2)]
  np.testing.assert_allclose(logits, np.stack(expected, axis=-1), rtol=1e-5)


def test_zero_initialisation():
  # In Shazeer 2017, appendix A, W_g = W_noise = 0, so that all experts begin equal, with noise of
  # standard deviation softplus(0) = ln 2. Catches noise weights that follow the router's scale, and
  # a standard deviation without softplus.
  _, p, (logits, fields) = _run(scale=0.0, fields=FIELDS)
  assert not np.any(logits) and not np.any(fields["primary"]) and not np.any(fields["threshold"])
  for name in ("noise_std", "primary_noise_std"):
    np.testing.assert_allclose(fields[name], np.log(2), rtol=1e-6)
  assert not np.any(_run(fields=FIELDS)[1]["router_noise"]) and np.any(
    _run(fields=FIELDS)[1]["router_primary"]
  )


def test_learned_fields():
  # Catches a field that reads the weights of another field or has its width.
  owner, p, _ = _run(fields=FIELDS)
  p = {
    name: jax.random.normal(jax.random.key(i), leaf.shape)
    for i, (name, leaf) in enumerate(sorted(p.items()))
  }
  _, fields = owner.apply({"params": p}, X)

  def softplus(a):
    return np.log1p(np.exp(a))

  np.testing.assert_allclose(fields["noise_std"], softplus(X @ p["router_noise"]), rtol=1e-4)
  np.testing.assert_allclose(fields["primary"], X @ p["router_primary"], rtol=1e-4)
  np.testing.assert_allclose(
    fields["primary_noise_std"], softplus(X @ p["router_primary_noise"]), rtol=1e-4
  )
  np.testing.assert_array_equal(fields["threshold"], p["router_threshold"])
  assert fields["primary"].shape == (2, 3, 2) and fields["noise_std"].dtype == jnp.float32


class Adjusted(nn.Module):
  """Applies `adjust` and makes the factors of experts."""

  options: GateOptions

  @nn.compact
  def __call__(self, logits):
    return adjust(self, logits, self.options), expert_scale(self, 2, self.options)


def test_bias_factor_and_cap_of_logits():
  # The logits 1 and 2 with biases 1 and -1 are 2 and 1, times 0.5 they are 1 and 0.5, and the cap 2
  # makes them 2 tanh(0.5) and 2 tanh(0.25). The derivative by a bias is 0.5 (1 - tanh^2). Catches
  # another order, a cap that is 2 tanh(x), and a bias without gradient.
  owner = Adjusted(GateOptions(router_bias=True, logit_scale=0.5, logit_softcap=2.0))
  logits = jnp.asarray([[[1.0, 2.0]]])
  first = nn.unbox(owner.init(jax.random.key(0), logits))["params"]
  np.testing.assert_array_equal(first["router_bias"], [0.0, 0.0])

  def total(bias):
    made, _ = owner.apply({"params": {"router_bias": bias}}, logits)
    return jnp.sum(made), made

  slope, made = jax.grad(total, has_aux=True)(jnp.asarray([1.0, -1.0]))
  np.testing.assert_allclose(made[0, 0], 2 * np.tanh([0.5, 0.25]), rtol=1e-6)
  np.testing.assert_allclose(slope, 0.5 * (1 - np.tanh([0.5, 0.25]) ** 2), rtol=1e-5)


def test_the_defaults_adjust_nothing():
  # Catches a parameter or an operation that existing models would get.
  owner = Adjusted(GateOptions())
  logits = jnp.asarray([[[1.0, 2.0]]])
  assert not owner.init(jax.random.key(0), logits)
  made, scale = owner.apply({}, logits)
  assert made is logits and scale is None


def test_factors_of_experts_scale_gates():
  # Catches factors in the order of assignments, a common factor that is left out, and a gate of an
  # assignment to no expert that is not 0.
  owner = Adjusted(GateOptions(expert_scale=True))
  first = nn.unbox(owner.init(jax.random.key(0), jnp.zeros((1, 1, 2))))["params"]
  np.testing.assert_array_equal(first["router_gate_scale"], [1.0, 1.0])
  plan = RoutingPlan(
    token=jnp.arange(3),
    expert=jnp.asarray([1, 0, 2]),
    gate=jnp.asarray([0.5, 0.25, 0.0]),
    num_experts=2,
  )
  scale = jnp.asarray([3.0, 5.0])
  np.testing.assert_allclose(scale_gates(plan, 2.0, scale).gate, [5.0, 1.5, 0.0])
  np.testing.assert_allclose(scale_gates(plan, 2.0, None).gate, [1.0, 0.5, 0.0])
  slope = jax.grad(lambda s: jnp.sum(scale_gates(plan, 2.0, s).gate))(scale)
  np.testing.assert_allclose(slope, [0.5, 1.0])
