"""Tests the FLOPs that are counted from HLO, with loops multiplied out."""

import jax
import jax.numpy as jnp
import pytest

from moe_jax.hlo.flops import hlo_matmul_flops, matmul_flops

pytestmark = pytest.mark.unit

MATRIX = jax.ShapeDtypeStruct((8, 8), jnp.float32)
ONE = 2 * 8**3  # FLOPs of MATRIX @ MATRIX


def test_products_of_several_shapes():
  # Catches a contracted dimension that is taken from the wrong side, and forgotten batch
  # dimensions.
  a, b = jax.ShapeDtypeStruct((3, 4, 5), jnp.float32), jax.ShapeDtypeStruct((3, 7, 5), jnp.float32)
  assert matmul_flops(lambda a, b: jnp.einsum("bik,bjk->bij", a, b), a, b) == 2 * 3 * 4 * 7 * 5
  assert matmul_flops(lambda a: jnp.sin(a) + a, a) == 0


def test_loops_are_multiplied_out_where_cost_analysis_counts_them_once():
  # Catches a loop's body that is counted once, and nested loops that are added, not multiplied.
  def inner(x):
    return jax.lax.scan(lambda c, _: (jnp.sin(c @ c), None), x, None, length=5)[0]

  def nested(x):
    return jax.lax.scan(lambda c, _: (inner(c), None), x, None, length=7)[0]

  assert matmul_flops(nested, MATRIX) == 35 * ONE
  assert jax.jit(nested).lower(MATRIX).compile().cost_analysis()["flops"] < 35 * ONE


def looped(n, x):
  with jax.named_scope("data_dependent"):
    return jax.lax.fori_loop(0, n, lambda _, c: jnp.sin(c @ c), x)


def test_dynamic_trip_counts_come_from_the_caller():
  # Catches a loop of unknown length that silently counts as one iteration, or not at all.
  n = jax.ShapeDtypeStruct((), jnp.int32)
  assert matmul_flops(looped, n, MATRIX, trips={"data_dependent": 11, "other": 5}) == 11 * ONE
  with pytest.raises(ValueError, match="data_dependent"):
    matmul_flops(looped, n, MATRIX, trips={"other": 5})


def test_derivatives_find_their_scope():
  # Catches scopes that are looked up only by their bare name, which autodiff wraps as jvp(scope).
  def loss(x):
    return jnp.sum(jax.lax.scan(lambda c, _: (jnp.sin(c @ c), None), x, None, length=4)[0])

  assert matmul_flops(jax.grad(loss), MATRIX) == 4 * 3 * ONE
  assert (
    matmul_flops(
      lambda n, x: jax.jvp(lambda x: looped(n, x), (x,), (x,))[1],
      jax.ShapeDtypeStruct((), jnp.int32),
      MATRIX,
      trips={"data_dependent": 2},
    )
    == 2 * 3 * ONE
  )


def test_the_dearest_branch_counts():
  # Catches branches that are summed.
  branches = [lambda x: x @ x, lambda x: x @ x @ x, jnp.sin]
  flops = matmul_flops(
    lambda i, x: jax.lax.switch(i, branches, x), jax.ShapeDtypeStruct((), jnp.int32), MATRIX
  )
  assert flops == 2 * ONE


def test_what_cannot_be_counted_is_refused():
  # Catches a library's matmul that counts as nothing.
  call = 'f32[2] custom-call(), custom_call_target="__cublas$gemm"'
  text = f"ENTRY %main () -> f32[2] {{\n  ROOT %c = {call}\n}}\n"
  with pytest.raises(ValueError, match="cublas"):
    hlo_matmul_flops(text)
  with pytest.raises(ValueError, match="ENTRY"):
    hlo_matmul_flops("")
