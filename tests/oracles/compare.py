"""Random groups of tokens, on which a router is held against its oracle, and against itself with
padding appended."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import reference

from moe_jax.routing import RoutingContext, group_axes

GROUPS, TOKENS, EXPERTS = 50, 12, 5


def draw_logits(seed, groups=60, tokens=12, experts=8, tied=10):
  """[groups, tokens, experts], normal, standard deviation 2, in multiples of 1/64; the last `tied`
  in whole numbers.

  So equal logits are equal in float32 and float64 alike, and so are sums and differences of a few
  of them.
  """
  drawn = 2.0 * np.random.default_rng(seed).normal(size=(groups, tokens, experts))
  grain = np.where(np.arange(groups) < groups - tied, 1 / 64, 1.0)[:, None, None]
  return np.float32(np.round(drawn / grain) * grain) + np.float32(
    0.0
  )  # of -0.0 and 0.0, sorting prefers the latter


def draw_tied_logits(rng, groups, tokens, experts):
  """Normal; in every second group experts 0 and 1 tie, and each token of odd position with the one
  before it.

  Equal columns and rows, so that float32 and float64 agree on the ties even after a softmax.
  """
  logits = rng.normal(size=(groups, tokens, experts)).astype(np.float32)
  if experts > 1:
    logits[::2, :, 1] = logits[::2, :, 0]
  logits[::2, 1::2] = logits[::2, :-1:2][:, : tokens // 2]
  return logits


def draw_valid(rng, groups, tokens):
  """Three in four tokens are real; in every third group all are, in the second none."""
  valid = rng.random((groups, tokens)) < 0.75
  valid[::3], valid[1:2] = True, False
  return valid


def draw(seed, groups=GROUPS, tokens=TOKENS, experts=EXPERTS):
  """Logits [G, S, E] of standard deviation 2, half of them with ties, and a training context with
  keys and padding."""
  rng = np.random.default_rng(seed)
  logits = 2.0 * draw_tied_logits(rng, groups, tokens, experts)
  return logits, RoutingContext(
    key=jax.random.split(jax.random.key(seed), groups),
    valid=draw_valid(rng, groups, tokens),
    train=True,
  )


def draw_context(seed, groups=60, tokens=12, **fields):
  """In every second group all tokens are real, in the others each with probability 3/4; in group 1
  none is."""
  valid = np.random.default_rng(seed).random((groups, tokens)) < 0.75
  valid[::2], valid[1:2] = True, False
  return RoutingContext(**{"valid": valid, "train": True, **fields})


def check_oracle(router, oracle, logits, context, **options):
  """Asserts the same (token, expert) in the same order in each of the groups, gates to 1e-5, and 0
  for nobody."""
  axes = group_axes(context).replace(train=None)  # not an array
  plans = jax.jit(jax.vmap(functools.partial(router, **options), in_axes=(0, group_axes(context))))(
    logits, context
  )
  plans, leaves = jax.device_get(plans), vars(context)  # NumPy's, which are faster to loop over
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
  """Asserts that 5 padded rows with large logits change nothing for 12 real tokens.

  Args:
    router: the function.
    longer: options for the group with padding, where they count rows (a capacity factor); None:
      `options`.
    token_ids: of the 12 tokens, where the router reads them.
    **options: for the group without padding.
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
  """The router's plan of one group, compiled once for equal options and shapes."""
  context = RoutingContext() if context is None else context
  return jax.jit(router, static_argnames=tuple(options))(jnp.asarray(logits), context, **options)


def gradient(router, logits, first=0, **options):
  """Of the sum of sin(gate), from the plan's assignment `first` on, by the logits; outside
  training."""

  def loss(logits):
    return jnp.sum(jnp.sin(router(logits, RoutingContext(), **options).gate[first:]))

  return np.asarray(jax.jit(jax.grad(loss))(logits))


def gradients(router, logits, context, variants):
  """The gradient of sum(sin(gates)) in the logits, for each of several dicts of options."""

  def loss(x, options):
    return jnp.sum(jnp.sin(router(x, context, **options).gate))

  return jax.device_get(
    jax.jit(lambda x: [jax.grad(loss)(x, options) for options in variants])(logits)
  )
