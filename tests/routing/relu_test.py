"""ReMoE by hand and against the oracle, and the loss and the rule that keep it sparse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from oracles import relu as oracle
from oracles.compare import check_oracle, draw_tied_logits, draw_valid

from moe_jax.errors import ConfigError
from moe_jax.routing import RoutingContext, losses
from moe_jax.routing.balancing import BalancingOptions, observe, update
from moe_jax.routing.relu import relu

pytestmark = pytest.mark.numerics
LOGITS = jnp.asarray([[0.5, -1.0, 2.0], [-0.1, -0.2, -0.3], [1.0, 1.0, 0.0]])


def test_by_hand():
  # Token 0 goes to experts 2 and 0, token 1 to none, token 2 to experts 0 and 1, because 0 is not
  # above 0. Catches >= and gates that are not the logits.
  plan = relu(LOGITS, RoutingContext())
  assert reference.assignments(plan) == [(0, 2, 2.0), (0, 0, 0.5), (2, 0, 1.0), (2, 1, 1.0)]
  assert reference.assignments(relu(LOGITS, RoutingContext(), most=1)) == [(0, 2, 2.0), (2, 0, 1.0)]


@pytest.mark.parametrize("most", [0, 2])
def test_equals_the_oracle(most):
  rng = np.random.default_rng(0)
  context = RoutingContext(valid=draw_valid(rng, 50, 12), train=True)
  check_oracle(relu, oracle.relu, draw_tied_logits(rng, 50, 12, 5), context, most=most)


def test_the_gradient_is_that_of_relu():
  # Catches gates without gradient, and a gradient where nothing is active.
  gradient = jax.grad(lambda x: jnp.sum(relu(x, RoutingContext()).gate))(LOGITS)
  np.testing.assert_array_equal(gradient, [[1, 0, 1], [0, 0, 0], [1, 1, 0]])


def test_the_loss_by_hand():
  # Of three tokens, two are real. Each expert's f is its active tokens over k T = 2: experts 0
  # and 2 have 1/2. P is (0.25, 0, 1), and the loss 3 (0.5 * 0.25 + 0.5 * 1). Catches padding that
  # counts, and an f that carries gradient.
  valid = jnp.asarray([True, True, False])

  def loss(logits):
    plan = relu(logits, RoutingContext(valid=valid))
    return losses.balance(*losses.sparsity_terms(plan, valid, 3, 1))

  value, gradient = jax.value_and_grad(loss)(LOGITS)
  assert float(value) == pytest.approx(3 * (0.5 * 0.25 + 0.5))
  np.testing.assert_allclose(gradient[0], [3 * 0.5 / 2, 0, 3 * 0.5 / 2])


def test_the_rule_makes_the_weight_grow_and_shrink():
  # Catches a weight that grows when there are too few experts, and one for each layer.
  options = BalancingOptions(rule="sparsity")
  seen = observe(
    jnp.zeros((1, 4, 3)),
    jnp.zeros(3),
    jnp.asarray([[True] * 3 + [False]]),
    scores=jnp.asarray,
    k=2,
    options=options,
  )
  sums = {name: jnp.stack([value, value]) for name, value in seen.items()}
  state = {"bias": jnp.zeros((2, 3))}
  # Two layers with k = 2 and three real tokens want 12 assignments.
  for assigned, factor in (([[6, 6, 0], [1, 0, 0]], 1.2), ([[2, 2, 2], [2, 2, 1]], 1 / 1.2)):
    after = update(state, sums | {"assigned": jnp.asarray(assigned)}, options)
    np.testing.assert_allclose(np.exp(after["bias"]), factor, rtol=1e-5)


def test_options_out_of_range():
  with pytest.raises(ConfigError, match="most=4"):
    relu(LOGITS, RoutingContext(), most=4)
  with pytest.raises(ConfigError, match="k=4"):
    relu(LOGITS, RoutingContext(), k=4)


def test_k_is_compared_with_the_experts():
  # Catches a k that is compared with the number of tokens.
  with pytest.raises(ConfigError, match="k=4"):
    relu(jnp.zeros((8, 3)), RoutingContext(), k=4)
  relu(jnp.zeros((1, 3)), RoutingContext(), k=3)
