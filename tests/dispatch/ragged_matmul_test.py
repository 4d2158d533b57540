import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dispatch import ragged_matmul as ragged
from moe_jax.dispatch.size_classes import layout
from moe_jax.dryrun.compile import FAST
from moe_jax.dryrun.machine import topology
from moe_jax.hlo.flops import hlo_matmul_flops, matmul_flops

pytestmark = pytest.mark.numerics

N, D, F = 200, 6, 10


def draw(sizes):
  """Returns rows, one matrix an expert, and the gradient of the results."""
  rng = np.random.default_rng(0)
  shapes = (N, D), (len(sizes), D, F), (N, F)
  return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize(
  "sizes", [(50, 50, 50, 50), (120, 3, 0, 77), (0, 0, 200, 0), (10, 0, 5, 1), (0, 0, 0, 0)]
)
def test_gradients_are_those_of_ragged_dot(monkeypatch, sizes):
  # Catches a chunk that counts rows of the next expert, a last chunk that is moved back because the
  # array ends, an expert without rows, and rows after the last group that are counted.
  monkeypatch.setattr(ragged, "_FIXED", (99,))
  rows, weights, d_out = draw(sizes)
  groups = jnp.array(sizes, jnp.int32)
  d_out = jnp.where(jnp.arange(N)[:, None] < sum(sizes), d_out, 0)

  def gradients(matmul):
    out, pull = jax.vjp(lambda rows, weights: matmul(rows, weights, groups), rows, weights)
    return out, *pull(d_out)

  for actual, expected in zip(
    gradients(ragged.ragged_matmul), gradients(jax.lax.ragged_dot), strict=True
  ):
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5)


def test_undefined_rows_do_not_reach_the_weights():
  # Catches 0 times NaN: what a kernel leaves in the rows after the last group may be anything.
  rows, _, d_out = draw((1, 2))
  wild = jnp.where(jnp.arange(N)[:, None] < 30, 0, jnp.nan)
  found = ragged.weight_gradients(rows + wild, d_out + wild, jnp.array([10, 20]))
  assert bool(jnp.isfinite(found).all())
  np.testing.assert_allclose(found[1], rows[10:30].T @ d_out[10:30], rtol=2e-5, atol=2e-5)


def test_flops_of_the_weights_gradient_do_not_grow_with_the_experts():
  # Catches the masked product of all rows for every expert, which XLA makes of ragged_dot on TPUs
  # before JAX 0.12.
  rows, d_out = jnp.ones((4096, 16)), jnp.ones((4096, 32))
  for experts in (8, 64):
    sizes = jnp.full(experts, 4096 // experts)
    trips = layout(sizes, 4096, ragged.STEPS).trips()
    found = matmul_flops(ragged.weight_gradients, rows, d_out, sizes, trips=trips)
    assert found == 2 * 4096 * 16 * 32


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[dryrun]'"
)
def test_flops_on_a_tpu_are_those_of_the_rows():
  # Catches a product of every row with every expert that only the TPU's own compiler makes: of
  # ragged_dot with several experts on a device it made 22 times the FLOPs.
  (device, *_) = topology.make_devices(topology.parse("v5e:1x1"))
  place, experts, width = jax.sharding.SingleDeviceSharding(device), 16, 128

  def abstract(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

  def both(rows, weights, sizes, d_out):
    out, pull = jax.vjp(lambda *args: ragged.ragged_matmul(*args, sizes), rows, weights)
    return out, pull(d_out)

  rows = 1024
  compiled = (
    jax.jit(both)
    .lower(
      abstract(rows, width),
      abstract(experts, width, width),
      abstract(experts, dtype=jnp.int32),
      abstract(rows, width),
    )
    .compile(compiler_options=FAST)
  )
  trips = layout(jnp.full(experts, rows // experts), rows, ragged.STEPS).trips()
  assert hlo_matmul_flops(compiled.as_text(), trips) == 3 * 2 * rows * width * width


def test_a_new_jax_needs_no_help(monkeypatch):
  # Catches loops that replace a kernel.
  rows, weights, _ = draw((1, 2))
  for fixed, loops in (((0, 0), False), ((99,), True)):
    monkeypatch.setattr(ragged, "_FIXED", fixed)
    gradient = jax.grad(lambda w: ragged.ragged_matmul(rows, w, jnp.array([10, 20])).sum())
    assert ("while" in str(jax.make_jaxpr(gradient)(weights))) == loops
