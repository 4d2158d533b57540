"""Expert threshold routing by hand and against the oracle, and the thresholds that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from oracles import expert_threshold as oracle
from oracles.compare import check_oracle, draw_tied_logits, draw_valid

from moe_jax.errors import ConfigError
from moe_jax.routing import RoutingContext
from moe_jax.routing.balancing import BalancingOptions, observe, update
from moe_jax.routing.expert_threshold import expert_threshold

pytestmark = pytest.mark.numerics
SCORES = np.array([[0.9, 0.2, 0.6], [0.55, 0.4, 0.1]])
LOGITS = jnp.asarray(np.log(SCORES / (1 - SCORES)), jnp.float32)


def _rounded(plan):
  return [(t, e, round(g, 4)) for t, e, g in reference.assignments(plan)]


def test_by_hand():
  # Without thresholds 1/2 counts; then thresholds are 0.7, 0.3 and 1/2 (0 is "not known yet").
  # Catches a bias of the wrong sign, and an order by score instead of by what exceeds the
  # threshold.
  assert _rounded(expert_threshold(LOGITS, RoutingContext())) == [
    (0, 0, 0.9),
    (0, 2, 0.6),
    (1, 0, 0.55),
  ]
  context = RoutingContext(bias=jnp.asarray([-0.85, -0.1, 0.0]))
  assert _rounded(expert_threshold(LOGITS, context)) == [
    (0, 1, 0.2),
    (0, 2, 0.6),
    (0, 0, 0.9),
    (1, 1, 0.4),
  ]


@pytest.mark.parametrize("most", [0, 2])
@pytest.mark.parametrize("biased", [True, False])
def test_equals_the_oracle(biased, most):
  rng = np.random.default_rng(2)
  # A bias that differs between experts breaks ties in float32 and float64 alike.
  bias = jnp.asarray([-0.4, -0.51, 0.0, -0.7, -0.3]) if biased else None
  context = RoutingContext(valid=draw_valid(rng, 50, 12), train=True, bias=bias)
  logits = draw_tied_logits(rng, 50, 12, 5)
  check_oracle(expert_threshold, oracle.expert_threshold, logits, context, most=most)


def test_each_expert_gets_its_part_of_the_next_batch():
  # Thresholds of one batch, moved by the rule, shall give each of 8 experts 2/8 of the tokens of
  # another one, though their logits are skewed. Catches the quantile at k/E, and a moving average
  # that begins at 0.
  options = BalancingOptions(rule="expert_quantile")
  rng = np.random.default_rng(0)
  skew = rng.normal(size=8)
  draw = [jnp.asarray(rng.normal(size=(4096, 8)) + skew, jnp.float32) for _ in range(2)]
  valid = jnp.ones((1, 4096), bool)
  state = {"bias": jnp.zeros((1, 8))}
  seen = observe(
    draw[0][None], state["bias"][0], valid, scores=jax.nn.sigmoid, k=2, options=options
  )
  state = update(state, {name: value[None] for name, value in seen.items()}, options)
  plan = expert_threshold(draw[1], RoutingContext(bias=state["bias"][0]), k=2)
  counts = np.bincount(np.asarray(plan.expert), minlength=9)[:8]
  np.testing.assert_allclose(counts / 4096, 0.25, atol=0.03)


def test_options_out_of_range():
  with pytest.raises(ConfigError, match="k=4"):
    expert_threshold(LOGITS, RoutingContext(), k=4)


def test_k_is_compared_with_the_experts():
  # Catches a k that is compared with the number of tokens.
  with pytest.raises(ConfigError, match="k=4"):
    expert_threshold(jnp.zeros((8, 3)), RoutingContext(), k=4)
  expert_threshold(jnp.zeros((1, 3)), RoutingContext(), k=3)
