"""Tests hash layers by hand and against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from oracles import compare
from oracles.hash_layer import finaliser
from oracles.hash_layer import hash_layer as oracle

from moe_jax.errors import ConfigError
from moe_jax.routing import RoutingContext
from moe_jax.routing.hash_layer import ROUTER, hash_layer

pytestmark = pytest.mark.numerics

LOGITS = jnp.zeros((4, 3))
IDS = np.array([7, 3, 7, 50_000])


def _experts(ids, num_experts, **options):
  logits, context = jnp.zeros((len(ids), num_experts)), RoutingContext(token_ids=jnp.asarray(ids))
  return np.asarray(jax.jit(lambda c: hash_layer(logits, c, **options))(context).expert)


def test_modulo_by_hand():
  # The ids 7, 3, 7 and 50000 are 1, 0, 1 and 2 modulo 3. Catches the position instead of the id,
  # and a gate other than 1.
  plan = hash_layer(LOGITS, RoutingContext(token_ids=jnp.asarray(IDS)), method="modulo")
  assert reference.assignments(plan) == [(0, 1, 1.0), (1, 0, 1.0), (2, 1, 1.0), (3, 2, 1.0)]


def test_the_finaliser_is_murmur_hash_3s():
  # MurmurHash3 (x86, 32 bits) of the empty string is the finaliser of the seed, and these are
  # published values. Catches wrong constants or shifts in the oracle with which the router is
  # compared.
  assert finaliser(1) == 0x514E28B7 and finaliser(0xFFFFFFFF) == 0x81F16F39


@pytest.mark.parametrize(
  ("experts", "options"),
  [(8, {}), (6, {"seed": 12}), (8, {"seed": -1}), (6, {"method": "modulo"}), (1, {})],
)
def test_equals_the_oracle(experts, options):
  # Catches constants or shifts that differ from the oracle's, signed arithmetic, seeds out of
  # range, padding with an expert, and a salt that is not used or that is expected to have an axis
  # of groups.
  ids = np.random.default_rng(1).integers(0, 2**31 - 1, size=(60, 12), dtype=np.int32)
  context = compare.draw_context(1, token_ids=ids)
  logits = compare.draw_logits(1, experts=experts)
  compare.check_oracle(hash_layer, oracle, logits, context, **options)
  compare.check_oracle(
    hash_layer, oracle, logits, context.replace(salt=np.uint32(0xF0000001)), **options
  )


def test_random_hash_is_balanced():
  # There are 51,200 ids and 64 experts, so each expert should get 800. Chi-square with 63 degrees
  # of freedom has mean 63 and standard deviation 11.2. Catches a weak hash, which does not spread
  # consecutive ids or multiples of the number of experts and of powers of two evenly.
  for stride in (1, 64, 1024):
    count = np.bincount(_experts(np.arange(51_200, dtype=np.int32) * stride, 64), minlength=64)
    assert 20 < np.sum((count - 800.0) ** 2) / 800.0 < 63 + 6 * 11.2, stride


def test_seeds_differ():
  # 1/16 of 4096 ids should have the same expert under two seeds, which is 256 with a standard
  # deviation of 15.5. Catches a seed that is not used or that only renames experts, with which all
  # or none are equal.
  ids = np.arange(4096, dtype=np.int32)
  for a, b in ((0, 1), (0, 2), (1, 2)):
    assert 160 < np.sum(_experts(ids, 16, seed=a) == _experts(ids, 16, seed=b)) < 352, (a, b)


def test_salts_differ_and_nothing_else_does():
  # Catches layers with the same hash, a hash that depends on the key, the group or training and is
  # therefore not a fixed function of the id, a salt that replaces the seed, and a salt that changes
  # the method "modulo".
  ids = jnp.arange(4096, dtype=jnp.int32)
  logits, salted = jnp.zeros((4096, 16)), RoutingContext(token_ids=ids, salt=jnp.uint32(7))

  def route(context, **options):
    return np.asarray(hash_layer(logits, context, **options).expert)

  for other in (
    route(salted.replace(salt=jnp.uint32(8))),
    route(salted, seed=1),
    route(salted.replace(salt=None)),
  ):
    assert 160 < np.sum(route(salted) == other) < 352
  trained = salted.replace(key=jax.random.key(1), group=jnp.int32(3), train=True)
  np.testing.assert_array_equal(route(trained), route(salted))
  np.testing.assert_array_equal(route(salted, method="modulo"), np.arange(4096) % 16)


def test_the_same_id_has_the_same_expert():
  # Catches a hash of the position.
  experts = _experts(np.array([9, 4, 9, 4, 9]), 64)
  assert len(set(experts[[0, 2, 4]])) == 1 and experts[1] == experts[3] != experts[0]


def test_appended_padding_changes_nothing():
  # Catches rows of padding that count.
  compare.check_appended_padding(hash_layer, token_ids=np.arange(12, dtype=np.int32))


def test_no_gradient():
  # Catches a gate that depends on the logits.
  context = RoutingContext(token_ids=jnp.asarray(IDS))
  assert not np.any(jax.grad(lambda x: jnp.sum(hash_layer(x, context).gate))(LOGITS))


def test_bad_options_are_named():
  # Catches an AttributeError because of None, and a KeyError.
  with pytest.raises(ValueError, match="token_ids"):
    hash_layer(LOGITS, RoutingContext())
  with pytest.raises(ConfigError, match="hash_layer.method.*modulo"):
    hash_layer(LOGITS, RoutingContext(token_ids=jnp.asarray(IDS)), method="modulus")


def test_bfloat16_logits_give_float32_gates():
  # Catches gates in the model's dtype.
  assert (
    hash_layer(LOGITS.astype(jnp.bfloat16), RoutingContext(token_ids=jnp.asarray(IDS))).gate.dtype
    == jnp.float32
  )


def test_looks_ahead():
  # Catches a declared leak, although a hash never depends on other tokens.
  assert ROUTER.leak() == "no"
