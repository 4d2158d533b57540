"""Token rounding by hand and against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from oracles import token_rounding as oracle
from oracles.compare import check_oracle, draw_tied_logits, draw_valid

from moe_jax.errors import ConfigError
from moe_jax.routing import ROUTERS, RoutingContext
from moe_jax.routing.token_rounding import token_rounding

pytestmark = pytest.mark.numerics
# Three tokens choose expert 0, and one chooses expert 1.
PROBS = np.array([[0.6, 0.4], [0.9, 0.1], [0.7, 0.3], [0.2, 0.8]])
LOGITS = jnp.log(jnp.asarray(PROBS, jnp.float32))
TRAIN = RoutingContext(train=True)


def _rounded(plan):
  return [(t, e, round(g, 4)) for t, e, g in reference.assignments(plan)]


@pytest.mark.parametrize(
  ("rounding", "expected"),
  [
    # With tiles of 2, the counts 3 and 1 become 2 and 0: expert 0 loses its least probable token.
    ("down", [(1, 0, 0.9), (2, 0, 0.7)]),
    # They become 4 and 2: expert 0 gets token 3, and expert 1 the most probable of the others, 0.
    ("up", [(0, 0, 0.6), (0, 1, 0.4), (1, 0, 0.9), (2, 0, 0.7), (3, 0, 0.2), (3, 1, 0.8)]),
  ],
)
def test_by_hand(rounding, expected):
  # Catches tokens that are taken by probability although others chose the expert, and the least
  # probable ones first.
  plan = token_rounding(LOGITS, TRAIN, k=1, tile=2, rounding=rounding)
  assert _rounded(plan) == expected


def test_halves_are_rounded_up_and_nothing_is_rounded_in_evaluation():
  # Catches Python's rounding to even, and evaluation that depends on later tokens.
  nearest = token_rounding(LOGITS, TRAIN, k=1, tile=2)
  assert _rounded(nearest) == _rounded(token_rounding(LOGITS, TRAIN, k=1, tile=2, rounding="up"))
  chosen = [(0, 0, 0.6), (1, 0, 0.9), (2, 0, 0.7), (3, 1, 0.8)]
  assert _rounded(token_rounding(LOGITS, RoutingContext(), k=1, tile=2)) == chosen
  assert _rounded(token_rounding(LOGITS, TRAIN, k=1, tile=1)) == chosen
  # In decoding a group is one token.
  assert len(_rounded(token_rounding(LOGITS[:1], RoutingContext(), k=1))) == 1
  assert not ROUTERS["token_rounding"].competes


@pytest.mark.parametrize("rounding", ["nearest", "up", "down"])
@pytest.mark.parametrize(("k", "tile"), [(1, 3), (2, 4), (3, 5), (2, 12)])
def test_equals_the_oracle(k, tile, rounding):
  # Catches counts that include padding, padding that fills tiles, and too little room in the plan.
  rng = np.random.default_rng(3)
  context = RoutingContext(valid=draw_valid(rng, 50, 12), train=True)
  logits, options = draw_tied_logits(rng, 50, 12, 5), {"k": k, "tile": tile, "rounding": rounding}
  check_oracle(token_rounding, oracle.token_rounding, logits, context, **options)


def test_all_counts_fill_tiles():
  # Catches counts that are rounded before tokens are taken from others.
  logits = jax.random.normal(jax.random.key(0), (256, 8))
  plan = jax.jit(lambda x: token_rounding(x, TRAIN, k=2, tile=16))(logits)
  counts = np.bincount(np.asarray(plan.expert), minlength=9)[:8]
  assert np.all(counts % 16 == 0) and abs(counts.sum() - 512) <= 8 * 8


def test_the_router_learns():
  # Catches a stop_gradient on the gates.
  def loss(x):
    return jnp.sum(jnp.square(token_rounding(x, TRAIN, k=1, tile=2).gate))

  assert np.all(np.abs(jax.grad(loss)(LOGITS)).max(axis=-1) > 0.01)


def test_options_out_of_range():
  for options in ({"k": 3}, {"k": 1, "rounding": "nearst"}, {"k": 1, "tile": 5}):
    with pytest.raises(ConfigError, match=r"token_rounding\."):
      token_rounding(LOGITS, TRAIN, **options)
