"""The cross-entropy by chunks of the vocabulary equals that of all logits, which never exist."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax import sharding
from moe_jax.hlo.flops import matmul_flops
from moe_jax.models.output import nats_by_chunks, output, token_nats, uses_chunks

pytestmark = pytest.mark.numerics

B, L, D = 4, 3, 8


def draw(vocab_size):
  """Returns (x, head, targets), of which some targets are the first and the last entry."""
  rng = np.random.default_rng(vocab_size)
  x = jnp.asarray(rng.normal(size=(B, L, D)), jnp.float32)
  head = jnp.asarray(rng.normal(size=(D, vocab_size)), jnp.float32)
  targets = rng.integers(0, vocab_size, (B, L)).astype(np.int32)
  targets[0, :2] = 0, vocab_size - 1
  return x, head, jnp.asarray(targets)


def loss(nats_of, targets):
  """Returns a loss of (x, head) in which nats and log Z of each position have other weights."""
  weights, squares = np.random.default_rng(1).normal(size=(2, *targets.shape))

  def f(x, head):
    nats, log_z = nats_of(x, head, targets)
    return jnp.sum(weights * nats + squares * log_z**2)

  return f


def whole(x, head, targets):
  return output(x, head, targets)


@pytest.mark.parametrize(
  "vocab_size, chunk", [(12, 4), (13, 4), (13, 6), (16, 1), (5, 4), (40, 20)]
)
def test_values_and_gradients_equal_those_of_all_logits(vocab_size, chunk):
  # Catches columns beyond the vocabulary that count in Z, a target in another chunk that is missed,
  # sums that are not rescaled when the maximum grows, a gradient without log Z's, and columns of
  # the gradient in another order.
  x, head, targets = draw(vocab_size)

  def by_chunks(x, head, targets):
    return nats_by_chunks(x, head, targets, chunk)

  expected, found = jax.jit(whole)(x, head, targets), jax.jit(by_chunks)(x, head, targets)
  np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
  wanted, gradient = (
    jax.jit(jax.grad(loss(f, targets), argnums=(0, 1)))(x, head) for f in (whole, by_chunks)
  )
  for one, other in zip(wanted, gradient, strict=True):
    np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5)


def test_large_logits_do_not_overflow():
  # Catches exponentials of logits from which the maximum is not subtracted, and a maximum of -inf
  # that makes NaN.
  x, head, targets = draw(12)
  nats, log_z = nats_by_chunks(1000 * x, head, targets, 4)
  expected = token_nats(1000 * x @ head, targets)
  np.testing.assert_allclose((nats, log_z), expected, rtol=1e-5, atol=1e-3)
  gradients = jax.grad(loss(lambda *a: nats_by_chunks(*a, 4), targets), argnums=(0, 1))(
    1000 * x, head
  )
  assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_only_targets_of_large_vocabularies_are_cut():
  # Catches a threshold that is one entry off, at which the numbers of small vocabularies would
  # move, and logits that are not returned.
  assert [uses_chunks(n, 8) for n in (15, 16, 17)] == [False, True, True]
  assert not uses_chunks(100, 0)
  x, head, targets = draw(16)
  assert output(x, head, None, 8).shape == (B, L, 16)
  # The order of sums is another one in chunks, so that equal bits show that there are none.
  np.testing.assert_array_equal(output(x, head, targets, 9), output(x, head, targets))
  assert "scan" in str(jax.make_jaxpr(lambda *a: output(*a, 8))(x, head, targets))


def sizes(jaxpr):
  """Yields the size of each floating-point value in a program, also inside loops."""
  for equation in jaxpr.eqns:
    yield from (
      math.prod(v.aval.shape)
      for v in equation.outvars
      if jnp.issubdtype(v.aval.dtype, jnp.floating)
    )
    for inner in jax.core.jaxprs_in_params(equation.params):
      yield from sizes(inner)


def test_logits_of_all_entries_never_exist():
  # Catches logits or probabilities that are saved for the backward pass, or for all chunks at once.
  vocab_size, chunk = 64 * D, 32
  x, head, targets = draw(vocab_size)

  def largest(f):
    return max(sizes(jax.make_jaxpr(jax.grad(loss(f, targets), argnums=(0, 1)))(x, head).jaxpr))

  assert largest(whole) == B * L * vocab_size
  # Nothing is larger than the output projection.
  assert largest(lambda *a: nats_by_chunks(*a, chunk)) == D * vocab_size < B * L * vocab_size


def test_flops_are_four_thirds():
  # Catches chunks that multiply with the whole output projection, and logits that are computed a
  # third time.
  x, head, targets = draw(64)
  matmul = 2 * B * L * D * 64
  for f, matmuls in ((whole, 3), (lambda *a: nats_by_chunks(*a, 16), 4)):
    assert matmul_flops(jax.grad(loss(f, targets), argnums=(0, 1)), x, head) == matmuls * matmul


@pytest.mark.parametrize(
  "axes", [{"tensor": 4}, {"data": 2, "tensor": 2}, {"fsdp": 2, "tensor": 2}]
)
def test_a_vocabulary_that_devices_share(axes):
  # Catches parts that are put together in the wrong order, and targets of another device's part.
  vocab_size, chunk = 24, 8
  x, head, targets = draw(vocab_size)
  wanted = jax.jit(jax.value_and_grad(loss(whole, targets), argnums=(0, 1)))(x, head)
  mesh = sharding.make_mesh(axes, jax.devices()[:4])
  with jax.set_mesh(mesh):
    x, head = (
      jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
      for array, spec in ((x, (("data", "fsdp"),)), (head, ("fsdp", "tensor")))
    )
    f = loss(lambda *a: nats_by_chunks(*a, chunk), targets)
    found = jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(x, head)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, wanted)
