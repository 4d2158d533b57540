"""Tests hierarchical gating and its load by hand and against the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from oracles import draws
from oracles import hierarchical as oracle
from oracles.compare import check_oracle, draw_tied_logits, draw_valid

from moe_jax.errors import ConfigError
from moe_jax.routing import RoutingContext
from moe_jax.routing.hierarchical import ROUTER, hierarchical, load

pytestmark = pytest.mark.numerics

# There are two groups of two experts: experts 0 and 1, and experts 2 and 3.
PRIMARY = jnp.log(jnp.array([[0.6, 0.4], [0.1, 0.9]]))
LOGITS = jnp.log(jnp.array([[0.7, 0.3, 0.2, 0.8], [0.5, 0.5, 0.9, 0.1]]))


def _rounded(plan):
  return [(t, e, round(g, 4)) for t, e, g in reference.assignments(plan)]


_route = jax.jit(hierarchical, static_argnames=("groups", "primary_k", "k", "priority"))


def _context(seed, groups_of_tokens, tokens, experts, groups, **fields):
  """Returns logits, and a context with all fields that the router reads."""
  rng = np.random.default_rng(seed)

  def uniform(width):
    return np.float32(rng.uniform(0.1, 2.0, (groups_of_tokens, tokens, width)))

  logits = draw_tied_logits(rng, groups_of_tokens, tokens, experts)
  return logits, RoutingContext(
    key=jax.random.split(jax.random.key(seed), groups_of_tokens),
    noise_std=uniform(experts),
    primary=draw_tied_logits(rng, groups_of_tokens, tokens, groups),
    primary_noise_std=uniform(groups),
    valid=draw_valid(rng, groups_of_tokens, tokens),
    **fields,
  )


def test_by_hand():
  # Each token takes the best expert of both groups, so the gates are those of the groups. Token 0
  # takes expert 0 of group 0 (0.6) and expert 3 of group 1 (0.4). Catches experts that are numbered
  # in the wrong order, a top-K over all experts, and a missing offset of the group.
  plan = _route(LOGITS, RoutingContext(primary=PRIMARY), groups=2, primary_k=2, k=1)
  assert _rounded(plan) == [(0, 0, 0.6), (1, 2, 0.9), (0, 3, 0.4), (1, 0, 0.1)]


def test_choices_are_ordered_by_group_then_member():
  # The gates of token 0 are 0.6*0.7, 0.6*0.3, 0.4*0.8 and 0.4*0.2, so that its experts and gates
  # are (0, 0.42), (1, 0.18), (3, 0.32) and (2, 0.08), although 0.32 > 0.18. The gates of token 1
  # are 0.9*0.9, 0.9*0.1 and twice 0.1*0.5, which is a tie. Catches choices that are sorted by gate,
  # and groups that are not normalised separately.
  route = functools.partial(
    _route, LOGITS, RoutingContext(primary=PRIMARY), groups=2, primary_k=2, k=2
  )
  expected = [
    (0, 0, 0.42),
    (0, 1, 0.18),
    (0, 3, 0.32),
    (0, 2, 0.08),
    (1, 2, 0.81),
    (1, 3, 0.09),
    (1, 0, 0.05),
    (1, 1, 0.05),
  ]
  assert _rounded(route(priority="token")) == expected
  assert _rounded(route()) == [expected[i] for i in (0, 4, 1, 5, 2, 6, 3, 7)]
  # The first choices have gates of 0.42 and 0.81, so token 1 comes first.
  assert _rounded(route(priority="gate")) == [expected[i] for i in (4, 0, 5, 1, 6, 2, 7, 3)]


@pytest.mark.parametrize(
  ("tokens", "experts", "train", "options"),
  [
    (12, 8, True, {"priority": "gate"}),
    (12, 8, False, {}),
    (12, 12, False, {"groups": 3, "primary_k": 1, "k": 3, "priority": "token"}),
    (12, 12, False, {"groups": 3, "primary_k": 2, "k": 1, "priority": "gate"}),
    (12, 6, False, {"groups": 2, "primary_k": 2, "k": 3}),
    (12, 1, False, {"groups": 1, "primary_k": 1, "k": 1}),
    (1, 8, False, {}),
  ],
)
def test_equals_the_oracle(tokens, experts, train, options):
  # Outside training the draws have ties. Catches swapped or shared streams of noise, and a
  # different order, tie rule or softmax.
  logits, context = _context(experts, 50, tokens, experts, options.get("groups", 4), train=train)
  check_oracle(hierarchical, oracle.hierarchical, logits, context, **options)


def test_padding_changes_nothing_for_others():
  # Catches noise at either level that depends on the number of rows, and padding that is served or
  # ranked.
  logits, contexts = _context(0, 1, 9, 8, 4, train=True)
  context = jax.tree.map(lambda leaf: leaf[0], contexts).replace(valid=jnp.arange(9) < 6)
  cut = context.replace(
    valid=None,
    **{name: getattr(context, name)[:6] for name in ("noise_std", "primary", "primary_noise_std")},
  )
  padded = _route(logits[0], context, priority="gate")
  assert _rounded(padded) == _rounded(_route(logits[0, :6], cut, priority="gate"))
  padding = np.asarray(padded.token) >= 6
  assert not np.any(np.asarray(padded.gate)[padding]) and np.all(
    np.asarray(padded.expert)[padding] == 8
  )


def test_gradient_flows_into_all_four():
  # dH/dsigma is eps at each level. Catches a stopped gradient, gates without noise, and the noise
  # of the other level.
  logits, contexts = _context(0, 1, 6, 8, 4, train=True)
  context = jax.tree.map(lambda leaf: leaf[0], contexts).replace(valid=None)

  def loss(logits, noise_std, primary, primary_noise_std):
    fields = {"noise_std": noise_std, "primary": primary, "primary_noise_std": primary_noise_std}
    return jnp.sum(jnp.sin(5 * hierarchical(logits, context.replace(**fields)).gate))

  by_logits, by_std, by_primary, by_primary_std = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(
    jnp.asarray(logits[0]), context.noise_std, context.primary, context.primary_noise_std
  )
  for level, gradient, by_deviation in ((1, by_logits, by_std), (0, by_primary, by_primary_std)):
    assert np.abs(gradient).max() > 0.01
    eps = draws.normal(jax.random.fold_in(context.key, level), gradient.shape)
    np.testing.assert_allclose(by_deviation, eps * gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
  ("groups", "primary_k", "k", "train"),
  [(4, 2, 1, True), (3, 1, 2, False), (2, 2, 3, False), (2, 1, 6, False)],
)
def test_load_equals_the_oracle(groups, primary_k, k, train):
  # Catches X^(i) that contains all tokens, padding in X, a sum over X^(i) that is not divided by
  # its size, the deviation of one level at both, and H that is compared with its own top-K by
  # value, which under jit may differ in the last bit.
  logits, contexts = _context(groups, 10, 7, 12, groups, train=train)
  one = functools.partial(load, groups=groups, primary_k=primary_k, k=k)
  actual = jax.jit(jax.vmap(one))(jnp.asarray(logits), contexts)
  expected = [
    oracle.load(logits[g], jax.tree.map(lambda leaf, g=g: leaf[g], contexts), groups, primary_k, k)
    for g in range(10)
  ]
  np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize(("primary_k", "k"), [(1, 1), (2, 1), (2, 2), (4, 3)])
def test_load_at_balance_and_collapse(primary_k, k):
  # There are 4 groups of 3 experts. Catches an unbiased variance, a missing level, and a
  # kth_excluding that is off by one at either level.
  same_group, same_member = (
    np.tile([3.0, 2.0, 1.0, 0.0], (12, 1)),
    np.tile([2.0, 1.0, 0.0], (12, 4, 1)),
  )
  each_group = np.stack([np.roll([3.0, 2.0, 1.0, 0.0], t) for t in range(12)])
  each_member = np.stack([np.tile(np.roll([2.0, 1.0, 0.0], t // 4), (4, 1)) for t in range(12)])
  std = jnp.full((12, 12), 0.01)

  def one(primary, inside):
    return load(
      inside.reshape(12, 12),
      RoutingContext(primary=primary, noise_std=std, primary_noise_std=std[:, :4]),
      groups=4,
      primary_k=primary_k,
      k=k,
    )

  actual = jax.jit(jax.vmap(one))(
    np.float32([each_group, same_group, same_group, each_group]),
    np.float32([each_member, same_member, each_member, same_member]),
  )
  np.testing.assert_allclose(
    actual, [0, 12 / (primary_k * k) - 1, 4 / primary_k - 1, 3 / k - 1], atol=1e-5
  )


def test_load_has_a_gradient_at_both_levels():
  # Catches a load that consists of integer counts, and NaN because of groups that no token picked
  # (here two) or of a batch that is all padding.
  primary, inside = (
    np.tile([3.0, 2.0, 1.0, 0.0], (12, 1)),
    np.tile([2.0, 1.0, 0.0], (12, 4, 1)).reshape(12, 12),
  )

  def loss(logits, primary, valid):
    return load(
      logits,
      RoutingContext(
        primary=primary,
        noise_std=jnp.ones((12, 12)),
        valid=valid,
        primary_noise_std=jnp.ones((12, 4)),
      ),
      groups=4,
      primary_k=2,
      k=1,
    )

  value = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
  inputs = (jnp.asarray(inside, jnp.float32), jnp.asarray(primary, jnp.float32))
  for gradient in value(*inputs, jnp.ones(12, bool))[1]:
    assert np.all(np.isfinite(gradient)) and np.abs(gradient).max() > 1e-4
  nothing, gradients = value(*inputs, jnp.zeros(12, bool))
  assert float(nothing) == 0.0 and all(not np.any(g) for g in gradients)


def test_bfloat16_is_computed_in_float32():
  # Catches a softmax in the model's dtype at either level.
  logits, contexts = _context(0, 1, 6, 8, 4)
  half = jax.tree.map(
    lambda leaf: leaf[0].astype(jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf[0], contexts
  )
  plan = _route(jnp.asarray(logits[0], jnp.bfloat16), half.replace(valid=None))
  assert plan.gate.dtype == jnp.float32
  np.testing.assert_allclose(np.asarray(plan.gate).reshape(4, 6).sum(0), 1.0, rtol=1e-6)


@pytest.mark.parametrize(
  ("options", "field"),
  [
    ({"groups": 3}, "groups"),
    ({"groups": 0}, "groups"),
    ({"groups": 2, "primary_k": 3}, "primary_k"),
    ({"groups": 2, "primary_k": 0}, "primary_k"),
    ({"groups": 2, "k": 3}, "hierarchical.k="),
    ({"groups": 2, "k": 0}, "hierarchical.k="),
    ({"groups": 2, "priority": "first"}, "priority"),
  ],
)
def test_bad_options_are_named(options, field):
  # Catches an error inside reshape or lax.top_k, and a KeyError.
  with pytest.raises(ConfigError, match=field):
    hierarchical(LOGITS, RoutingContext(primary=PRIMARY), **options)


@pytest.mark.parametrize(
  ("context", "field"),
  [
    (RoutingContext(), "primary"),
    (RoutingContext(primary=jnp.zeros((2, 4))), "primary"),
    (RoutingContext(primary=PRIMARY, key=jax.random.key(0), train=True), "primary_noise_std"),
    (
      RoutingContext(primary=PRIMARY, primary_noise_std=PRIMARY, key=jax.random.key(0), train=True),
      "noise_std",
    ),
  ],
)
def test_missing_inputs_are_named(context, field):
  # Catches arithmetic with None, and indices of groups that are out of bounds, for which a gather
  # returns NaN.
  with pytest.raises(ValueError, match=f"RoutingContext.{field}"):
    hierarchical(LOGITS, context, groups=2)


def test_load_needs_deviations():
  # Catches a division by None in evaluation, where the router itself draws no noise.
  with pytest.raises(ValueError, match="RoutingContext.primary_noise_std"):
    load(LOGITS, RoutingContext(primary=PRIMARY), groups=2, primary_k=1, k=1)


def test_load_names_bad_options():
  # Catches an error inside reshape.
  with pytest.raises(ConfigError, match="groups"):
    load(LOGITS, RoutingContext(primary=PRIMARY), groups=3, primary_k=1, k=1)


def test_looks_ahead_default_is_the_routers_default():
  # A later token's first choice is served before an earlier token's second choice. Catches a
  # changed default of the router or of `looks_ahead`.
  assert ROUTER.leak() == "overflow" and ROUTER.leak(priority="gate") == "yes"
  assert ROUTER.leak(primary_k=1, k=1) == "no" and ROUTER.leak(primary_k=2, k=1) == "overflow"
  plan = _route(jnp.zeros((2, 8)), RoutingContext(primary=jnp.zeros((2, 4))))
  assert plan.token.shape == (2 * 4,) and list(plan.token[:3]) == [0, 1, 0]
