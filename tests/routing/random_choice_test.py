"""Tests that random experts are uniform, distinct, and reproducible where they must be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from oracles import compare
from oracles.random_choice import random_choice as oracle

from moe_jax.errors import ConfigError
from moe_jax.routing import RoutingContext
from moe_jax.routing.random_choice import ROUTER, random_choice

pytestmark = pytest.mark.numerics

LOGITS = jnp.zeros((4, 3))
KEY = jax.random.key(1)


def _experts(context, tokens=4, **options):
  return np.asarray(random_choice(jnp.zeros((tokens, 3)), context, **options).expert)


def test_by_hand(monkeypatch):
  # Each of four tokens gets two of three experts according to the numbers below. Catches the lowest
  # numbers, gates other than 1/2, the same expert twice, and second choices before first choices.
  drawn = jnp.array([[0.1, 0.9, 0.5], [0.7, 0.2, 0.7], [0.0, 0.0, 0.0], [0.3, 0.4, 0.8]])
  monkeypatch.setattr(jax.random, "uniform", lambda key, shape: drawn)
  plan = random_choice(LOGITS, RoutingContext(), k=2)
  assert reference.assignments(plan) == [
    (0, 1, 0.5),
    (1, 0, 0.5),
    (2, 0, 0.5),
    (3, 2, 0.5),
    (0, 2, 0.5),
    (1, 2, 0.5),
    (2, 1, 0.5),
    (3, 1, 0.5),
  ]


@pytest.mark.parametrize(("train", "options"), [(True, {"k": 8}), (False, {"k": 3, "seed": 5})])
def test_equals_the_oracle(train, options):
  # Catches numbers that are not drawn from the group's key in training, or from seed, salt and
  # group otherwise, and padding with an expert.
  context = compare.draw_context(
    1, train=train, key=jax.random.split(KEY, 60), group=np.arange(60), salt=np.uint32(0xF0000001)
  )
  compare.check_oracle(random_choice, oracle, compare.draw_logits(1), context, **options)


@pytest.mark.parametrize(("tokens", "experts"), [(1, 1), (1, 6)])
def test_corners(tokens, experts):
  # Catches errors at E = 1 and S = 1.
  context = compare.draw_context(3, 5, tokens, key=jax.random.split(KEY, 5))
  compare.check_oracle(random_choice, oracle, compare.draw_logits(3, 5, tokens, experts), context)


def test_which_numbers_are_drawn():
  # Catches evaluation that depends on the key, training that does not, and a seed that is not used.
  evaluation = _experts(RoutingContext(key=KEY), tokens=64)
  np.testing.assert_array_equal(evaluation, _experts(RoutingContext(), tokens=64))
  np.testing.assert_array_equal(evaluation, _experts(RoutingContext(train=True), tokens=64))
  for other in (
    _experts(RoutingContext(key=KEY, train=True), tokens=64),
    _experts(RoutingContext(), 64, seed=1),
  ):
    assert np.any(evaluation != other)


def test_evaluation_differs_by_layer_and_by_group():
  # With 64 tokens and 3 experts, two independent draws agree on 21 tokens with a standard deviation
  # of 3.8. Catches the same numbers in every layer, in every group or for every seed of a run, and
  # a salt and a group that can be swapped.
  def drawn(salt, group):
    return _experts(RoutingContext(salt=jnp.uint32(salt), group=jnp.int32(group)), tokens=64)

  np.testing.assert_array_equal(drawn(1, 2), drawn(1, 2))
  for other in (drawn(1, 3), drawn(2, 2), drawn(2, 1), _experts(RoutingContext(), tokens=64)):
    assert np.sum(drawn(1, 2) == other) < 21 + 5 * 3.8


def test_uniform():
  # With 9000 tokens and 3 experts, each expert gets 3000 with a standard deviation of 45. Catches
  # an expert that is left out or preferred.
  first, second = np.split(_experts(RoutingContext(key=KEY, train=True), tokens=9000, k=2), 2)
  for chosen in (first, second):
    assert np.all(np.abs(np.bincount(chosen, minlength=3) - 3000) < 5 * 45)
  assert np.all(first != second)


def test_appended_padding_changes_nothing():
  # Catches numbers of the first tokens that depend on the number of tokens that follow.
  compare.check_appended_padding(random_choice, k=2)


def test_no_gradient():
  # Catches a gate that depends on the logits.
  assert not np.any(jax.grad(lambda x: jnp.sum(random_choice(x, RoutingContext()).gate))(LOGITS))


@pytest.mark.parametrize("k", [0, 4])
def test_bad_k_is_named(k):
  # Catches K > E that fails inside lax.top_k, and a division by 0.
  with pytest.raises(ConfigError, match="random_choice.k"):
    random_choice(LOGITS, RoutingContext(), k=k)


def test_bfloat16_logits_give_float32_gates():
  # Catches gates in the model's dtype.
  assert random_choice(LOGITS.astype(jnp.bfloat16), RoutingContext()).gate.dtype == jnp.float32


def test_looks_ahead_default_is_the_routers_default():
  # Catches defaults that differ from those of the router.
  assert ROUTER.leak() == "no" == ROUTER.leak(k=2)
