"""The TPU's kernel of attention equals the plain form where it is emulated, and is compiled."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax import sharding
from moe_jax.hlo.flops import hlo_matmul_flops
from moe_jax.layers.attend import attend, visible
from moe_jax.layers.splash_attention import attend_by_splash, obstacle

pytestmark = pytest.mark.numerics

B, L, K, G, P, U = 2, 256, 2, 2, 64, 32


def draw(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  shapes = ((B, L, K, G, P), (B, L, K, P), (B, L, K, U))
  return [jnp.asarray(rng.normal(size=shape) / 4, dtype) for shape in shapes]


SEGMENTS = jnp.asarray(np.stack([np.repeat([1, 2, 0], [100, 130, 26]), np.ones(L, int)]))


@pytest.mark.parametrize(
  "options", [{}, {"window": 40}, {"causal": False}], ids=["causal", "window", "encoder"]
)
def test_values_and_gradients_equal_the_plain_form(options):
  # Catches heads that read the keys of another head, documents that see each other, a window that
  # is one key off, and a mask of another form.
  arguments = draw()
  weights = jnp.asarray(np.random.default_rng(1).normal(size=(B, L, K, G, U)), jnp.float32)

  def plain(q, k, v):
    return attend(q, k, v, visible(SEGMENTS, options.get("causal", True), options.get("window", 0)))

  def kernel(q, k, v):
    return attend_by_splash(q, k, v, SEGMENTS, interpret=True, **options)

  def both(f):
    def loss(*inputs):
      return jnp.sum(weights * f(*inputs))

    return jax.jit(f)(*arguments), *jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arguments)

  for wanted, found in zip(both(plain), both(kernel), strict=True):
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize(
  "changes, words",
  [
    ({}, ""),
    ({"length": 200}, "128 does not divide 200"),
    ({"has_bias": True}, "it has no biases"),
    ({"has_sinks": True}, "it has no sinks"),
    ({"has_dropout": True}, "it has no dropout"),
    ({"kv_heads": 3}, "devices cannot share 3 key-value heads"),
  ],
  ids=str,
)
def test_what_the_kernel_cannot_compute(changes, words):
  # Catches a kernel that refuses while a step is traced, that ignores biases, sinks or dropout, or
  # that has each device compute the heads of others.
  options = dict(length=1024, kv_heads=4, has_bias=False, has_sinks=False, has_dropout=False)
  with jax.set_mesh(sharding.make_mesh({"tensor": 2})):
    assert obstacle(**options | changes) == words


needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[dryrun]'"
)


@needs_libtpu
def test_old_tpus_have_no_kernel():
  # Catches a kernel in a program for TPUs that Pallas cannot compile for, whose name is another.
  from moe_jax.dryrun.machine import topology

  def found(name):
    machine = topology.parse(name)
    with jax.set_mesh(sharding.make_mesh({"data": -1}, topology.make_devices(machine))):
      return obstacle(1024, 4, has_bias=False, has_sinks=False, has_dropout=False)

  assert found("v3:2x2") == "it cannot be compiled for TPU v3" and found("v5e:2x2") == ""


@needs_libtpu
def test_the_kernel_is_compiled_for_a_mesh():
  # Catches blocks that the TPU's compiler refuses, heads or rows that are gathered on all devices,
  # and scores outside of the kernel.
  from moe_jax.dryrun.machine import topology

  machine = topology.parse("v5e:2x2")
  mesh = sharding.make_mesh({"data": 2, "tensor": 2}, topology.make_devices(machine))
  rows, length = 4, 1024

  def abstract(*shape):
    own = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=own)

  ids = jax.ShapeDtypeStruct(
    (rows, length), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec("data"))
  )

  def loss(q, k, v, ids):
    mixed = attend_by_splash(q, k, v, ids, window=300)
    return jnp.sum(mixed.astype(jnp.float32) ** 2)

  with jax.set_mesh(mesh):
    program = (
      jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
      .lower(
        abstract(rows, length, K, G, 192),
        abstract(rows, length, K, 192),
        abstract(rows, length, K, 128),
        ids,
      )
      .compile(compiler_options={"exec_time_optimization_effort": -1.0})
    )
  text = program.as_text()
  # Of four blocks of 512 queries and keys one is not computed, and heads and rows are divided.
  squares = rows * K * G // 4 * length**2 * 3 / 4
  assert hlo_matmul_flops(text) == 2 * squares * (5 * 192 + 4 * 128)
  # One kernel for the forward pass, and two for the gradients of queries and of keys and values.
  assert text.count('custom_call_target="tpu_custom_call"') == 3
  assert "all-gather" not in text and f"{length},{length}]" not in text
