"""SparseMixer by hand and against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from oracles import sparse_mixer as oracle
from oracles.compare import check_appended_padding, check_oracle, draw, draw_logits

from moe_jax.errors import ConfigError
from moe_jax.routing import RoutingContext
from moe_jax.routing.sparse_mixer import ROUTER, sparse_mixer

pytestmark = pytest.mark.numerics


def _rounded(plan):
  return [(t, e, round(g, 4)) for t, e, g in reference.assignments(plan)]


def test_by_hand():
  # The largest logit is 2. With epsilon = 0.1 others may be at most 0.2 times the larger of 2 and
  # their size below it, so that 1.7 stays and 1.5 does not: the gate is 1/(1 + e^-0.3) = 0.5744. Of
  # the rest, 1.5 stays beside 1.7 (0.2 < 0.34), with 1/(1 + e^-0.2) = 0.5498. Catches a softmax
  # over all experts, the first choice that takes part in the second softmax, and a width of
  # epsilon.
  logits = jnp.asarray([[1.7, 2.0, -3.0, 1.5]])
  plan = sparse_mixer(logits, RoutingContext(), epsilon=0.1)
  assert _rounded(plan) == [(0, 1, 0.5744), (0, 0, 0.5498)]


@pytest.mark.parametrize(
  "options", [{}, {"k": 1, "epsilon": 0.5}, {"k": 3, "epsilon": 0.2}], ids=str
)
@pytest.mark.parametrize("train", [True, False])
def test_equals_the_oracle(options, train):
  # Catches samples in evaluation, draws that are used twice, the wrong Heun factor, padding with an
  # expert, and an expert that is chosen twice.
  logits, context = draw(4)
  # No two differences are near the limits, where float32 and float64 could disagree.
  logits = np.round(logits * 8) / 8 + np.float32(1 / 3)
  check_oracle(sparse_mixer, oracle.sparse_mixer, logits, context.replace(train=train), **options)


def test_the_gradient_is_that_of_the_probability():
  # Catches a gradient with the factor 1/3 of Heun's method, and one through the samples.
  logits = jax.random.normal(jax.random.key(0), (64, 4)) * 0.1 + 3
  context = RoutingContext(key=jax.random.key(1), train=True)

  def gate(x, context):
    return sparse_mixer(x, context, k=1, epsilon=1.0).gate

  plan = sparse_mixer(logits, context, k=1, epsilon=1.0)
  chosen = jnp.take_along_axis(jax.nn.softmax(logits), plan.expert[:, None], axis=-1)[:, 0]
  ratio = np.round(np.asarray(plan.gate / chosen), 4)
  assert set(ratio) == {np.float32(0.3333), np.float32(1.0)}

  def probability(x):
    picked = jnp.take_along_axis(jax.nn.softmax(x), plan.expert[:, None], axis=-1)
    return jnp.sum(jnp.sin(jnp.arange(64)) * picked[:, 0])

  ours = jax.grad(lambda x: jnp.sum(jnp.sin(jnp.arange(64)) * gate(x, context)))(logits)
  np.testing.assert_allclose(ours, jax.grad(probability)(logits), atol=1e-6)


def test_samples_follow_the_probabilities():
  # Of 4000 tokens with probabilities 0.5, 0.3 and 0.2, shares of the first choice differ from them
  # by less than 0.04, which is 5 standard deviations. Catches the noise of another distribution.
  logits = jnp.log(jnp.tile(jnp.asarray([[0.5, 0.3, 0.2]]), (4000, 1))) + 5
  context = RoutingContext(key=jax.random.key(2), train=True)
  plan = jax.jit(lambda x, c: sparse_mixer(x, c, k=1, epsilon=1.0))(logits, context)
  shares = np.bincount(np.asarray(plan.expert), minlength=3) / 4000
  np.testing.assert_allclose(shares, [0.5, 0.3, 0.2], atol=0.04)


def test_zero_logits_are_equal():
  # Catches 0/0 where all logits are 0, as they are with router_init_scale=0.
  plan = sparse_mixer(jnp.zeros((1, 4)), RoutingContext())
  assert _rounded(plan) == [(0, 0, 0.25), (0, 1, 0.3333)]


def test_appended_padding_changes_nothing():
  # Catches rows of padding that count.
  logits = draw_logits(1)
  assert logits.shape[-1] == 8
  check_appended_padding(lambda x, c: sparse_mixer(x, c.replace(key=None)))


def test_options_out_of_range():
  for options in ({"k": 5}, {"epsilon": -0.1}):
    with pytest.raises(ConfigError, match=r"sparse_mixer\."):
      sparse_mixer(jnp.zeros((2, 4)), RoutingContext(), **options)


def test_looks_ahead():
  # Catches a declared leak of a choice by the token alone.
  assert (ROUTER.leak(k=1), ROUTER.leak(k=2)) == ("no", "overflow")
