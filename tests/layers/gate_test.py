"""Tests the learned inputs of a router: its logits and other fields."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_jax.layers import NETWORKS
from moe_jax.layers.gate import learned

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
