"""SeqTopK by hand and against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from oracles import sequence_top_k as oracle
from oracles.compare import check_oracle, draw_tied_logits, draw_valid

from moe_jax.errors import ConfigError
from moe_jax.routing import RoutingContext
from moe_jax.routing.sequence_top_k import sequence_top_k

pytestmark = pytest.mark.numerics
PROBS = np.array([[0.5, 0.4, 0.1], [0.34, 0.33, 0.33], [0.8, 0.15, 0.05]])
LOGITS = jnp.log(jnp.asarray(PROBS, jnp.float32))


def _rounded(plan):
  return [(t, e, round(g, 4)) for t, e, g in reference.assignments(plan)]


def test_by_hand():
  # Three tokens with one expert each on average: the three largest probabilities are those of
  # tokens 2, 0 and 0, so that token 1 has none. Catches a choice per token or per expert.
  plan = sequence_top_k(LOGITS, RoutingContext(), k=1)
  assert _rounded(plan) == [(2, 0, 0.8), (0, 0, 0.5), (0, 1, 0.4)]


@pytest.mark.parametrize("k", [1, 3, 5])
def test_equals_the_oracle(k):
  rng = np.random.default_rng(3)
  context = RoutingContext(valid=draw_valid(rng, 50, 12), train=True)
  check_oracle(
    sequence_top_k, oracle.sequence_top_k, draw_tied_logits(rng, 50, 12, 5), context, k=k
  )


def test_the_router_learns():
  # Catches a stop_gradient on the gates.
  gradient = jax.grad(lambda x: jnp.sum(jnp.square(sequence_top_k(x, RoutingContext(), k=1).gate)))(
    LOGITS
  )
  assert np.abs(gradient[2]).max() > 0.01 and not np.any(gradient[1])


def test_options_out_of_range():
  with pytest.raises(ConfigError, match="k=4"):
    sequence_top_k(LOGITS, RoutingContext(), k=4)
