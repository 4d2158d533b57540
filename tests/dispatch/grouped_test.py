"""Tests the dropless dispatcher beyond `conformance_test`.

The tests cover several chunks and size classes, the cost, rematerialisation, scan and bfloat16.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dispatch.einsum import einsum
from moe_jax.dispatch.grouped import GROUPED_MATMULS, grouped, plan_layout
from moe_jax.errors import ConfigError
from moe_jax.experts import Experts
from moe_jax.hlo.flops import matmul_flops
from moe_jax.routing.plan import RoutingPlan

pytestmark = pytest.mark.numerics

G, S, K, E, D, F = 2, 64, 2, 4, 8, 12
TOKENS = np.tile(np.arange(S), K)


def make_plan(expert, seed=0):
  """Returns the plan in which assignment a of each group names expert[group, a]."""
  gate = np.random.default_rng(seed).uniform(0.1, 1, (G, K * S)).astype(np.float32) * (expert < E)
  return RoutingPlan(
    token=jnp.asarray(np.tile(TOKENS, (G, 1))),
    expert=jnp.asarray(expert),
    gate=jnp.asarray(gate),
    num_experts=E,
  )


def draw(weights, seed=0):
  """Returns K different experts for each token, drawn by the Gumbel trick.

  They are drawn from E + 1 indices, the last of which stands for no expert.
  """
  rng = np.random.default_rng(seed)
  order = np.argsort(
    -(np.log(np.asarray(weights) + 1e-9) + rng.gumbel(size=(G, S, E + 1))), axis=-1
  )[..., :K]
  return order.swapaxes(1, 2).reshape(G, K * S)


PLANS = {
  "balanced": draw([1, 1, 1, 1, 0]),
  "skewed": draw([8, 3, 1, 0.1, 0]),
  "some go nowhere": draw([1, 2, 1, 1, 3]),
  "one expert takes all": np.tile(np.repeat([2, E], S), (G, 1)),  # Second choices name no expert.
  "nobody goes anywhere": np.full((G, K * S), E),
}


@functools.cache
def inputs():
  keys = jax.random.split(jax.random.key(0), 5)

  def normal(key, *shape):
    return jax.random.normal(key, shape) / 2

  experts = Experts(
    normal(keys[0], E, D, F), normal(keys[1], E, F, D), normal(keys[2], E, D, F), "swiglu"
  )
  return normal(keys[3], G, S, D), experts, normal(keys[4], G, S, D)


@functools.cache
def run(dispatcher, platform="cpu", capacity=None):
  """Returns a function from (plan, x, experts, d_y) to (y, d_x, d_gate, d_experts).

  It is compiled once for all plans.
  """

  def both(plan, x, experts, d_y):
    def f(x, gate, experts):
      return dispatcher(plan.replace(gate=gate), x, experts, capacity, platform)

    y, pull = jax.vjp(f, x, plan.gate, experts)
    return y, *pull(d_y)

  return jax.jit(both)


def close(actual, expected, tolerance=2e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=tolerance, atol=tolerance
    ),
    actual,
    expected,
  )


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("name", PLANS)
def test_equals_einsum(name, platform):
  # Catches a chunk that destroys rows of another expert, lost weight gradients of a second chunk,
  # weight gradients of an expert without rows, rows of assignments that name no expert, and a wrong
  # inverse map.
  x, experts, d_y = inputs()
  plan = make_plan(PLANS[name])
  y, d_x, d_gate, d_experts = run(grouped, platform)(plan, x, experts, d_y)
  expected = run(einsum)(plan, x, experts, d_y)
  # `grouped` promises a gradient of 0 for gates whose assignments name no expert.
  real = np.asarray(plan.expert) < E
  close((y, d_x, d_experts), (expected[0], expected[1], expected[3]))
  close(np.asarray(d_gate), np.where(real, expected[2], 0))


def test_the_plans_exercise_what_they_should():
  # Catches shapes that are so small that every expert is one chunk of the same class.
  layouts = {name: plan_layout(make_plan(expert)) for name, expert in PLANS.items()}
  assert int(layouts["one expert takes all"].chunks.max()) > 1
  busy = {name: sum(np.diff(np.asarray(l.bounds)) > 0) for name, l in layouts.items()}
  assert busy["skewed"] > 2 and busy["nobody goes anywhere"] == 0


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_capacity_is_honoured(platform):
  # Catches a capacity that is ignored, or that is applied to all groups together.
  x, experts, d_y = inputs()
  plan = make_plan(PLANS["skewed"])
  close(
    run(grouped, platform, 10)(plan, x, experts, d_y), run(einsum, "cpu", 10)(plan, x, experts, d_y)
  )


def test_flops_follow_the_load():
  # The FLOPs of the forward pass, and of both passes, are at most 1.3 times the ideal for any
  # distribution. Catches the E-fold cost of ragged_dot, a product that is computed twice in the
  # backward pass, and pre-activations that are recomputed.
  x, experts, d_y = inputs()
  forward = jax.jit(lambda plan, x, experts: grouped(plan, x, experts, None, "cpu"))
  for name in ("balanced", "skewed", "one expert takes all"):
    plan = make_plan(PLANS[name])
    ideal = 2 * int(jnp.sum(plan.expert < E)) * 3 * D * F
    trips = plan_layout(plan).trips()
    assert 1 <= matmul_flops(forward, plan, x, experts, trips=trips) / ideal <= 1.3
    assert 1 <= matmul_flops(run(grouped), plan, x, experts, d_y, trips=trips) / (3 * ideal) <= 1.3

  def by_ragged_dot(plan, x, experts):
    return grouped(plan, x, experts, None, "tpu")

  # This E-fold cost is the reason why CPUs have an implementation of their own.
  assert matmul_flops(by_ragged_dot, plan, x, experts) == E * 2 * G * S * K * 3 * D * F


def test_gpus_multiply_rows_with_their_own_experts_only():
  # Catches ragged_dot on a GPU, for which XLA copies each row for every expert: compiled for an
  # H100, 64 experts took 6.7 GB of temporaries in place of 0.15.
  x, experts, d_y = inputs()
  plan = make_plan(PLANS["balanced"])
  assert "ragged_dot" not in str(jax.make_jaxpr(run(grouped, "gpu"))(plan, x, experts, d_y))
  one = jax.tree.map(lambda leaf: leaf[:1], experts)
  alone = dataclasses.replace(plan, num_experts=1, expert=jnp.zeros_like(plan.expert))
  assert "ragged_dot" in str(jax.make_jaxpr(run(grouped, "gpu"))(alone, x, one, d_y))


def test_rows_are_never_scattered():
  # Catches a gather whose derivative is a scatter-add of rows.
  x, experts, d_y = inputs()
  jaxpr = str(jax.make_jaxpr(run(grouped))(make_plan(PLANS["balanced"]), x, experts, d_y))
  assert "scatter-add" not in jaxpr and "scatter_add" not in jaxpr


def test_scan_and_remat():
  # Catches a custom derivative that does not work in a layer that is scanned or rematerialised.
  x, experts, d_y = inputs()
  plan = make_plan(PLANS["skewed"])
  stacked = jax.tree.map(lambda a: jnp.stack([a, a / 2]), experts)

  def layer(x, experts):
    return (jnp.tanh(x + grouped(plan, x, experts, None, "cpu")), None)

  def scanned(x, stacked):
    return jnp.sum(d_y * jax.lax.scan(jax.checkpoint(layer), x, stacked)[0])

  def unrolled(x, stacked):
    for i in range(2):
      x = jnp.tanh(x + einsum(plan, x, jax.tree.map(lambda a, i=i: a[i], stacked), None, "cpu"))
    return jnp.sum(d_y * x)

  close(
    jax.jit(jax.grad(scanned, (0, 1)))(x, stacked), jax.jit(jax.grad(unrolled, (0, 1)))(x, stacked)
  )


def test_bfloat16_rows_over_float32_weights():
  # Catches gradients with the wrong dtype, and a weighted sum that is not computed in float32.
  x, experts, d_y = inputs()
  plan = make_plan(PLANS["skewed"])
  half = x.astype(jnp.bfloat16)
  y, d_x, d_gate, d_experts = run(grouped)(plan, half, experts, d_y.astype(jnp.bfloat16))
  assert y.dtype == d_x.dtype == jnp.bfloat16 and d_gate.dtype == jnp.float32
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(d_experts))
  close((y, d_x, d_gate, d_experts), run(grouped)(plan, x, experts, d_y), 0.06)


def test_an_unknown_platform_is_named():
  # Catches a silent fallback to the slow implementation.
  x, experts, _ = inputs()
  with pytest.raises(ConfigError, match="platform='abacus'"):
    grouped(make_plan(PLANS["balanced"]), x, experts, None, "abacus")
  assert {"cpu", "gpu", "tpu"} <= set(GROUPED_MATMULS)
