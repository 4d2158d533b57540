"""Attention by blocks equals the plain form, with fewer FLOPs and without scores of a whole row."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.hlo.flops import matmul_flops
from moe_jax.layers.attend import attend, visible
from moe_jax.layers.blocked_attention import MOST_SPANS, attend_in_blocks, uses_blocks

pytestmark = pytest.mark.numerics

B, K, G, P, U = 2, 2, 2, 4, 6


def draw(length, keys=None, heads=(K, G)):
  """Returns random (q, k, v), whose values have another width than the keys."""
  rng = np.random.default_rng(length)
  keys = keys or length
  shapes = ((B, length, *heads, P), (B, keys, heads[0], P), (B, keys, heads[0], U))
  return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def documents(length):
  """Returns (segments, positions) of a row of two documents and padding, and of a row of one."""
  first, second = length // 3, length // 2
  lengths = (first, second, length - first - second)
  segments = np.ones((B, length), np.int32)
  segments[0] = np.repeat([1, 2, 0], lengths)
  positions = np.tile(np.arange(length), (B, 1))
  positions[0] = np.concatenate([np.arange(n) for n in lengths])
  return jnp.asarray(segments), jnp.asarray(positions)


def by_distance(distance):
  """Returns a bias that differs by head and distance, and by the sign of the distance."""
  head = jnp.arange(1.0, K * G + 1).reshape(K, G, 1, 1)
  return jnp.sin(head * distance[:, None, None] / 5)


# length, block, and the options of `attend_in_blocks`. Lengths that blocks do not divide, a block
# for each query, more blocks than spans, and windows that are shorter and longer than a block.
CASES = [
  (16, 4, {}),
  (19, 4, {}),
  (7, 1, {}),
  (40, 2, {}),
  (40, 3, {"bias": by_distance}),
  (24, 4, {"window": 1}),
  (24, 4, {"window": 6}),
  (27, 4, {"window": 8}),
  (27, 4, {"window": 11, "bias": by_distance}),
  (24, 4, {"window": 17}),
  (19, 4, {"causal": False}),
  (19, 4, {"causal": False, "bias": by_distance}),
]


def shown(value):
  """Returns the id of a parameter, which must be the same in each process of the tests."""
  return " ".join(value) if isinstance(value, dict) else None


@pytest.mark.parametrize("length, block, options", CASES, ids=shown)
def test_values_and_gradients_equal_the_plain_form(length, block, options):
  # Catches a key that is outside of the slice of a block, a slice that the ends of a row move but
  # whose mask stays, a window or a causal mask that is one place off, queries that fill up the last
  # block, blocks in the wrong order, and biases of other tokens.
  arguments = draw(length)
  segments, positions = documents(length)
  causal, window = options.get("causal", True), options.get("window", 0)
  bias = options.get("bias")

  def plain(q, k, v):
    distance = positions[:, :, None] - positions[:, None, :]
    mask = visible(segments, causal, window)
    return attend(q, k, v, mask, bias=bias(distance) if bias else None)

  def blocked(q, k, v):
    return attend_in_blocks(
      q, k, v, segments, segments, block=block, positions=positions, **options
    )

  check(plain, blocked, arguments)


def check(plain, blocked, arguments):
  """Compares values, and the gradients of a sum whose weights differ from place to place."""
  expected, found = jax.jit(plain)(*arguments), jax.jit(blocked)(*arguments)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  weights = jnp.asarray(np.random.default_rng(1).normal(size=expected.shape), jnp.float32)

  def gradients(function):
    return jax.jit(
      jax.grad(lambda *inputs: jnp.sum(weights * function(*inputs)), argnums=(0, 1, 2))
    )(*arguments)

  for wanted, gradient in zip(gradients(plain), gradients(blocked), strict=True):
    np.testing.assert_allclose(gradient, wanted, atol=1e-5)


def test_sinks_stand_beside_the_keys_of_each_block():
  # Catches blocks whose heads have no sink or that of another head, and a sink that does not learn.
  arguments = draw(19)
  segments, _ = documents(19)
  sink = jnp.asarray(np.random.default_rng(2).normal(size=(K, G)), jnp.float32)

  def plain(q, k, sink):
    return attend(q, k, arguments[2], visible(segments), sink=sink)

  def blocked(q, k, sink):
    return attend_in_blocks(q, k, arguments[2], segments, segments, block=4, sink=sink)

  check(plain, blocked, [*arguments[:2], sink])
  without = attend(*arguments, visible(segments))
  assert not np.allclose(plain(*arguments[:2], sink), without, atol=1e-3)


def test_attention_to_a_memory():
  # The last query's document has no key. Catches a causal mask over a memory, keys of nobody that
  # are seen, and an average for a query that sees nothing.
  arguments = draw(9, keys=5)
  queries, keys = documents(9)[0].at[:, -1].set(7), jnp.asarray([[2, 1, 1, -1, -1]] * B)

  def plain(q, k, v):
    mask = queries[:, :, None] == keys[:, None, :]
    return jnp.where(jnp.any(mask, -1)[:, :, None, None, None], attend(q, k, v, mask), 0)

  def blocked(q, k, v):
    return attend_in_blocks(q, k, v, queries, keys, block=4, causal=False)

  check(plain, blocked, arguments)
  assert not np.any(blocked(*arguments)[:, -1])


def test_short_rows_are_computed_at_once():
  # Catches a threshold that is one token off, at which the numbers of short rows would move.
  assert [uses_blocks(n, 256) for n in (1023, 1024, 1025)] == [False, True, True]
  assert not uses_blocks(2048, 0)


LONG = 1024


def gradient_of(**options):
  """Returns the gradient of a sum of attention's squared outputs, of rows of LONG tokens."""
  segments, _ = documents(LONG)

  def loss(q, k, v):
    if options["block"]:
      mixed = attend_in_blocks(q, k, v, segments, segments, **options)
    else:
      mixed = attend(q, k, v, visible(segments, window=options.get("window", 0)))
    return jnp.sum(mixed**2)

  return jax.grad(loss, argnums=(0, 1, 2))


def arrays(jaxpr):
  """Yields the shape and dtype of each value in a program, also inside loops."""
  for equation in jaxpr.eqns:
    yield from (v.aval for v in equation.outvars)
    for inner in jax.core.jaxprs_in_params(equation.params):
      yield from arrays(inner)


@pytest.mark.parametrize("window", [0, 64])
def test_no_scores_of_a_whole_row_exist(window):
  # Catches scores, weights or a mask of all queries and all keys, in the forward pass, saved, or in
  # the backward pass.
  arguments = draw(LONG)
  largest = {
    block: max(
      math.prod(aval.shape)
      for aval in arrays(jax.make_jaxpr(gradient_of(block=block, window=window))(*arguments).jaxpr)
    )
    for block in (0, 128)
  }
  assert largest[0] == B * K * G * LONG * LONG
  assert largest[128] <= B * K * G * 128 * (LONG if not window else 63 + 128)


def test_only_the_arguments_are_saved():
  # Catches scores or slices of the keys that are saved for the backward pass of each block, or of
  # the loop over them.
  arguments = draw(LONG)
  segments, _ = documents(LONG)

  def backward(*inputs):
    return jax.vjp(
      lambda q, k, v: attend_in_blocks(q, k, v, segments, segments, block=128), *inputs
    )[1]

  saved = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(backward, *arguments)))
  # Beside queries, keys and values, there are documents, places and positions of queries and keys.
  assert saved <= sum(leaf.size for leaf in arguments) + 2 * (B + 1 + 1) * LONG + 8 * MOST_SPANS


# The FLOPs of one matmul of all queries with all keys, for features of width 1.
SQUARE = 2 * B * K * G * LONG**2


@pytest.mark.parametrize(
  "block, window, keys",
  [
    # The keys that a query reads on average. Eight spans of two blocks read 1/8, 2/8, ... 8/8.
    (64, 0, LONG * 9 / 16),
    # Two spans of two blocks read a half and all.
    (256, 0, LONG * 3 / 4),
    # There are no more than eight spans.
    (16, 0, LONG * 9 / 16),
    (128, 64, 63 + 128),
    # A window of more than half of the row saves nothing that being causal does not save.
    (128, 600, LONG * 5 / 8),
  ],
)
def test_flops_are_those_of_the_keys_that_are_read(block, window, keys):
  # Catches a causal row whose blocks read all keys, and a window whose blocks read all earlier
  # ones. The backward pass has the scores again, and four more matmuls.
  segments, _ = documents(LONG)
  options = {"block": block, "window": window}

  def forward(q, k, v):
    return attend_in_blocks(q, k, v, segments, segments, **options)

  arguments = draw(LONG)
  share = keys / LONG
  assert matmul_flops(forward, *arguments) == pytest.approx(SQUARE * (P + U) * share)
  assert matmul_flops(gradient_of(**options), *arguments) == pytest.approx(
    SQUARE * (P + U + P + 2 * U + 2 * P) * share
  )
