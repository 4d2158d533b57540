"""Top-p routing by hand and against the oracle, and the rule that holds the mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from oracles import top_p as oracle
from oracles.compare import check_oracle, draw_tied_logits, draw_valid

from moe_jax.errors import ConfigError
from moe_jax.routing import RoutingContext, metrics
from moe_jax.routing.balancing import BalancingOptions, observe, update
from moe_jax.routing.top_p import top_p

pytestmark = pytest.mark.numerics
LOGITS = jnp.log(jnp.asarray([[0.6, 0.3, 0.1], [0.2, 0.45, 0.35]]))


def _rounded(plan):
  return [(t, e, round(g, 4)) for t, e, g in reference.assignments(plan)]


@pytest.mark.parametrize(
  ("p", "experts"),
  [
    (0.5, [(0, 0, 0.6), (1, 1, 0.45), (1, 2, 0.35)]),
    (0.4, [(0, 0, 0.6), (1, 1, 0.45)]),
    (1e-6, [(0, 0, 0.6), (1, 1, 0.45)]),
    (0.85, [(0, 0, 0.6), (0, 1, 0.3), (1, 1, 0.45), (1, 2, 0.35), (1, 0, 0.2)]),
  ],
)
def test_by_hand(p, experts):
  # Catches the largest set below p in place of the smallest that reaches it, and gates that are
  # renormalised.
  assert _rounded(top_p(LOGITS, RoutingContext(), p=p)) == experts


def test_a_bias_moves_p_and_never_the_first_expert():
  # Catches a bias that is added to the scores, and a token that loses its only expert.
  for bias, count in ((0.35, 5), (-0.9, 2)):
    plan = top_p(LOGITS, RoutingContext(bias=jnp.full(3, bias)), p=0.5)
    assert len(reference.assignments(plan)) == count


@pytest.mark.parametrize("most", [0, 2])
@pytest.mark.parametrize("p", [0.3, 0.7])
def test_equals_the_oracle(p, most):
  rng = np.random.default_rng(1)
  context = RoutingContext(valid=draw_valid(rng, 50, 12), train=True)
  check_oracle(top_p, oracle.top_p, draw_tied_logits(rng, 50, 12, 5), context, p=p, most=most)


def test_the_rule_holds_the_mean():
  # Tokens with random logits shall have 3 experts of 8. Catches a controller that runs away.
  options = BalancingOptions(rule="mean_k", rate=0.05)
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 512, 8)) * 2, jnp.float32)
  valid = jnp.ones((1, 512), bool)

  @jax.jit
  def step(state):
    plan = top_p(logits[0], RoutingContext(bias=state["bias"][0]), p=0.3, k=3)
    seen = observe(logits, state["bias"][0], valid, scores=jnp.asarray, k=3, options=options)
    assigned = jnp.zeros(8, jnp.int32).at[plan.expert].add(1, mode="drop")
    sums = {name: value[None] for name, value in seen.items()} | {"assigned": assigned[None]}
    return update(state, sums, options), jnp.sum(assigned) / 512

  state, means = {name: jnp.zeros((1, 8)) for name in options.state}, []
  for _ in range(100):
    state, mean = step(state)
    means.append(float(mean))
  assert means[0] < 2 and means[-1] == pytest.approx(3, abs=0.1)


def test_entropy_by_hand():
  # Catches padding that counts, and a sum in place of the mean.
  logits = jnp.stack([jnp.zeros(4), jnp.asarray([50.0, 0, 0, 0])])
  assert float(metrics.entropy(logits, None)) == pytest.approx(np.log(4) / 2)
  assert float(metrics.entropy(logits, jnp.asarray([True, False]))) == pytest.approx(np.log(4))


def test_options_out_of_range():
  with pytest.raises(ConfigError, match=r"p=1\.5"):
    top_p(LOGITS, RoutingContext(), p=1.5)


def test_k_is_compared_with_the_experts():
  # Catches a k that is compared with the number of tokens.
  with pytest.raises(ConfigError, match="k=4"):
    top_p(jnp.zeros((8, 3)), RoutingContext(), k=4)
  top_p(jnp.zeros((1, 3)), RoutingContext(), k=3)
