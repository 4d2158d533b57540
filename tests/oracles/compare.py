"""Random inputs for routers, and comparisons of a router with its oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import reference

from moe_jax.routing import RoutingContext, group_axes

GROUPS, TOKENS, EXPERTS = 50, 12, 5


def draw_logits(seed, groups=60, tokens=12, experts=8, tied=10):
  """Returns normal logits [groups, tokens, experts] with standard deviation 2.

  They are multiples of 1/64, and whole numbers in the last `tied` groups, where many are equal.
  Equal logits, and equal sums and differences of a few logits, are therefore equal in float32 and
  in float64.
  """
  drawn = 2.0 * np.random.default_rng(seed).normal(size=(groups, tokens, experts))
  grain = np.where(np.arange(groups) < groups - tied, 1 / 64, 1.0)[:, None, None]
  # Adding 0.0 turns -0.0 into 0.0. Otherwise sorting would put 0.0 before -0.0.
  return np.float32(np.round(drawn / grain) * grain) + np.float32(0.0)


def draw_tied_logits(rng, groups, tokens, experts):
  """Returns normal logits with ties in every second group.

  There the experts 0 and 1 have equal logits, and so have each token at an odd position and the
  token before it. Whole columns and rows are equal, so that float32 and float64 agree on the ties
  even after a softmax.
  """
  logits = rng.normal(size=(groups, tokens, experts)).astype(np.float32)
  if experts > 1:
    logits[::2, :, 1] = logits[::2, :, 0]
  logits[::2, 1::2] = logits[::2, :-1:2][:, : tokens // 2]
  return logits


def draw_valid(rng, groups, tokens):
  """Returns a mask in which each token is real with probability 3/4.

  In every third group, all tokens are real. In group 1, none is.
  """
  valid = rng.random((groups, tokens)) < 0.75
  valid[::3], valid[1:2] = True, False
  return valid


def draw(seed, groups=GROUPS, tokens=TOKENS, experts=EXPERTS):
  """Returns logits [G, S, E] and a training context with keys and padding.

  The logits have standard deviation 2, and half of the groups have ties.
  """
  rng = np.random.default_rng(seed)
  logits = 2.0 * draw_tied_logits(rng, groups, tokens, experts)
  return logits, RoutingContext(
    key=jax.random.split(jax.random.key(seed), groups),
    valid=draw_valid(rng, groups, tokens),
    train=True,
  )


def draw_context(seed, groups=60, tokens=12, **fields):
  """Returns a training context with padding and the given fields.

  In every second group, all tokens are real. In the other groups, each token is real with
  probability 3/4, except that in group 1 no token is.
  """
  valid = np.random.default_rng(seed).random((groups, tokens)) < 0.75
  valid[::2], valid[1:2] = True, False
  return RoutingContext(**{"valid": valid, "train": True, **fields})


def check_oracle(router, oracle, logits, context, **options):
  """Asserts that a router and its oracle return the same plan for each group.

  The pairs of token and expert must be equal and in the same order. Gates must agree to 1e-5, and
  be 0 for assignments to no expert.
  """
  axes = group_axes(context).replace(train=None)  # `train` is not an array
  plans = jax.jit(jax.vmap(functools.partial(router, **options), in_axes=(0, group_axes(context))))(
    logits, context
  )
  # NumPy arrays are faster to loop over than JAX arrays.
  plans, leaves = jax.device_get(plans), vars(context)
  for g in range(len(logits)):
    one = context.replace(
      **{name: leaves[name][g] for name, axis in vars(axes).items() if axis is not None}
    )
    plan = jax.tree.map(lambda leaf: leaf[g], plans)  # noqa: B023 (used at once)
    expected, actual = oracle(logits[g], one, **options), reference.assignments(plan)
    assert [a[:2] for a in actual] == [a[:2] for a in expected], f"group {g}"
    np.testing.assert_allclose(
      [a[2] for a in actual], [a[2] for a in expected], rtol=1e-5, err_msg=f"group {g}"
    )
    assert not np.any(plan.gate[plan.expert == plan.num_experts])
    assert plan.gate.dtype == np.float32


def check_appended_padding(router, longer=None, token_ids=None, **options):
  """Asserts that 5 rows of padding with large logits change nothing for 12 real tokens.

  Args:
    router: The router function.
    longer: The options for the group with padding, if they depend on the number of rows, as a
      capacity factor does. None means `options`.
    token_ids: The vocabulary ids of the 12 tokens, if the router reads them.
    **options: The options for the group without padding.
  """
  logits = draw_logits(7, groups=1)[0]
  padded = np.concatenate([logits, np.full((5, logits.shape[1]), 9.0, np.float32)])
  ids = None if token_ids is None else jnp.asarray(token_ids)
  context = RoutingContext(key=jax.random.key(7), token_ids=ids, train=True)
  beside = context.replace(
    valid=jnp.arange(17) < 12, token_ids=None if ids is None else jnp.pad(ids, (0, 5))
  )
  expected = reference.assignments(run(router, logits, context, **options))
  actual = reference.assignments(run(router, padded, beside, **(longer or options)))
  assert [a[:2] for a in actual] == [a[:2] for a in expected]
  np.testing.assert_allclose([a[2] for a in actual], [a[2] for a in expected], rtol=1e-6)


def run(router, logits, context=None, **options):
  """Returns the plan of one group. It compiles once for equal options and shapes."""
  context = RoutingContext() if context is None else context
  return jax.jit(router, static_argnames=tuple(options))(jnp.asarray(logits), context, **options)


def gradient(router, logits, first=0, **options):
  """Returns the gradient of the sum of sin(gate) with respect to the logits, outside training.

  The sum is over the assignments of the plan from `first` on.
  """

  def loss(logits):
    return jnp.sum(jnp.sin(router(logits, RoutingContext(), **options).gate[first:]))

  return np.asarray(jax.jit(jax.grad(loss))(logits))


def gradients(router, logits, context, variants):
  """Returns the gradient of sum(sin(gates)) with respect to the logits for each dict of options."""

  def loss(x, options):
    return jnp.sum(jnp.sin(router(x, context, **options).gate))

  return jax.device_get(
    jax.jit(lambda x: [jax.grad(loss)(x, options) for options in variants])(logits)
  )
