"""Tests experts by a hash with learned gates, by hand and against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from oracles import compare
from oracles.hash_layer import mix
from oracles.hash_top_k import hash_top_k as oracle

from moe_jax.errors import ConfigError
from moe_jax.routing import RoutingContext
from moe_jax.routing.hash_top_k import ROUTER, hash_top_k

pytestmark = pytest.mark.numerics


ID = 7


def _context(ids, **fields):
  return RoutingContext(token_ids=jnp.asarray(ids, jnp.int32), **fields)


def test_by_hand():
  # The numbers of an id for four experts, by the published hash, order the experts. The scores
  # of experts with sqrt(softplus) 3 and 1 are gates of 3/4 and 1/4, whichever logits the others
  # have. Catches experts by logits, unsigned numbers that are compared as signed ones, and gates
  # that are normalised over all experts.
  number = mix(ID, 0)
  by_number = sorted(range(4), key=lambda e: -mix(number, e))
  assert len({mix(number, e) >= 2**31 for e in range(4)}) == 2
  logits = np.full((1, 4), 9.0, np.float32)
  logits[0, by_number[:2]] = np.log(np.expm1([9.0, 1.0]))
  plan = hash_top_k(jnp.asarray(logits), _context([ID]), k=2)
  actual = [(t, e, round(g, 4)) for t, e, g in reference.assignments(plan)]
  assert actual == [(0, by_number[0], 0.75), (0, by_number[1], 0.25)]


@pytest.mark.parametrize(
  "options",
  [
    {"k": 3},
    {"k": 2, "score": "sigmoid", "gate_norm": "none", "seed": -3},
    {"k": 8, "score": "softmax", "norm_eps": 0.5},
    {"k": 1},
  ],
  ids=str,
)
def test_equals_the_oracle(options):
  # Catches shifts that differ from the oracle's, padding with an expert, and a salt or a seed that
  # is not used.
  ids = np.random.default_rng(1).integers(0, 2**31 - 1, size=(60, 12), dtype=np.int32)
  context = compare.draw_context(1, token_ids=ids)
  logits = compare.draw_logits(1)
  compare.check_oracle(hash_top_k, oracle, logits, context, **options)
  salted = context.replace(salt=np.uint32(0xF0000001))
  compare.check_oracle(hash_top_k, oracle, logits, salted, **options)


def test_experts_are_balanced_and_differ():
  # 20,480 ids take 2 of 16 experts each, so each expert should have 2560 with a standard deviation
  # below 50, and each of the 120 pairs of experts 170.7 with one of 13. Catches numbers of an id
  # that hang together, and an expert that is taken twice.
  ids = np.arange(20_480)
  plan = jax.jit(lambda x, c: hash_top_k(x, c, k=2))(jnp.zeros((len(ids), 16)), _context(ids))
  pairs = np.sort(np.asarray(plan.expert).reshape(2, -1), axis=0)
  assert np.all(pairs[0] != pairs[1])
  assert np.all(np.abs(np.bincount(pairs.ravel(), minlength=16) - 2560) < 250)
  counts = np.bincount(pairs[0] * 16 + pairs[1], minlength=256)
  assert np.all(np.abs(counts[counts > 0] - 170.7) < 70) and np.sum(counts > 0) == 120


def test_only_gates_have_a_gradient():
  # Catches gates without one, and logits of experts that were not chosen which get one.
  context = _context([5, 9])

  def loss(logits):
    return jnp.sum(jnp.sin(hash_top_k(logits, context, k=2, gate_norm="none").gate))

  gradient = np.asarray(jax.grad(loss)(jnp.ones((2, 6))))
  assert np.all(np.sum(gradient != 0, axis=1) == 2)


def test_appended_padding_changes_nothing():
  # Catches rows of padding that count.
  compare.check_appended_padding(hash_top_k, token_ids=np.arange(12, dtype=np.int32), k=2)


def test_bad_options_are_named():
  # Catches an AttributeError because of None, and a KeyError.
  with pytest.raises(ValueError, match="token_ids"):
    hash_top_k(jnp.zeros((2, 3)), RoutingContext(), k=2)
  for options in ({"k": 4}, {"score": "softmix", "k": 1}, {"gate_norm": "all", "k": 1}):
    with pytest.raises(ConfigError, match=r"hash_top_k\."):
      hash_top_k(jnp.zeros((2, 3)), _context([1, 2]), **options)


def test_looks_ahead():
  # Catches a declared leak of a hash of one token.
  assert (ROUTER.leak(k=1), ROUTER.leak(k=2)) == ("no", "overflow")
