"""The dropless dispatcher beyond the conformance table: several chunks and classes, cost, remat,
scan and bfloat16."""

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
  """The plan whose assignment a of each group names expert[a]."""
  gate = np.random.default_rng(seed).uniform(0.1, 1, (G, K * S)).astype(np.float32) * (expert < E)
  return RoutingPlan(
    token=jnp.asarray(np.tile(TOKENS, (G, 1))),
    expert=jnp.asarray(expert),
    gate=jnp.asarray(gate),
    num_experts=E,
  )


def draw(weights, seed=0):
  """K different experts for each token (of E + 1, where the last is nobody), by the Gumbel
  trick."""
  rng = np.random.default_rng(seed)
  order = np.argsort(
    -(np.log(np.asarray(weights) + 1e-9) + rng.gumbel(size=(G, S, E + 1))), axis=-1
  )[..., :K]
  return order.swapaxes(1, 2).reshape(G, K * S)


PLANS = {
  "balanced": draw([1, 1, 1, 1, 0]),
  "skewed": draw([8, 3, 1, 0.1, 0]),
  "some go nowhere": draw([1, 2, 1, 1, 3]),
  "one expert takes all": np.tile(np.repeat([2, E], S), (G, 1)),  # second choices name nobody
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
  """(plan, x, experts, d_y) -> (y, d_x, d_gate, d_experts), compiled once for all plans."""

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
  # Catches: a chunk that destroys its neighbour's rows, weight gradients of a second chunk lost or
  # of an idle expert left over, rows of assignments that name nobody, the wrong inverse map.
  x, experts, d_y = inputs()
  plan = make_plan(PLANS[name])
  y, d_x, d_gate, d_experts = run(grouped, platform)(plan, x, experts, d_y)
  expected = run(einsum)(plan, x, experts, d_y)
  real = (
    np.asarray(plan.expert) < E
  )  # einsum gives gates of nobody no gradient either, but grouped promises it
  close((y, d_x, d_experts), (expected[0], expected[1], expected[3]))
  close(np.asarray(d_gate), np.where(real, expected[2], 0))


def test_the_plans_exercise_what_they_should():
  # Catches: shapes so small that every expert is one chunk of one class.
  layouts = {name: plan_layout(make_plan(expert)) for name, expert in PLANS.items()}
  assert int(layouts["one expert takes all"].chunks.max()) > 1
  busy = {name: sum(np.diff(np.asarray(l.bounds)) > 0) for name, l in layouts.items()}
  assert busy["skewed"] > 2 and busy["nobody goes anywhere"] == 0


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_capacity_is_honoured(platform):
  # Catches: capacity ignored, or counted over all groups together.
  x, experts, d_y = inputs()
  plan = make_plan(PLANS["skewed"])
  close(
    run(grouped, platform, 10)(plan, x, experts, d_y), run(einsum, "cpu", 10)(plan, x, experts, d_y)
  )


def test_flops_follow_the_load():
  # Forward and forward+backward within 1.3 of ideal at any distribution. Catches: ragged_dot's
  # E-fold cost, a product computed twice in the backward, pre-activations recomputed.
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

  assert (
    matmul_flops(by_ragged_dot, plan, x, experts) == E * 2 * G * S * K * 3 * D * F
  )  # why the CPU has its own


def test_rows_are_never_scattered():
  # Catches: a gather whose derivative XLA turns into a scatter-add of rows.
  x, experts, d_y = inputs()
  jaxpr = str(jax.make_jaxpr(run(grouped))(make_plan(PLANS["balanced"]), x, experts, d_y))
  assert "scatter-add" not in jaxpr and "scatter_add" not in jaxpr


def test_scan_and_remat():
  # Catches: a custom derivative that does not survive being a scanned or rematerialised layer.
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
  # Catches: gradients in the wrong dtype, a combine that is not summed in float32.
  x, experts, d_y = inputs()
  plan = make_plan(PLANS["skewed"])
  half = x.astype(jnp.bfloat16)
  y, d_x, d_gate, d_experts = run(grouped)(plan, half, experts, d_y.astype(jnp.bfloat16))
  assert y.dtype == d_x.dtype == jnp.bfloat16 and d_gate.dtype == jnp.float32
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(d_experts))
  close((y, d_x, d_gate, d_experts), run(grouped)(plan, x, experts, d_y), 0.06)


def test_an_unknown_platform_is_named():
  # Catches: a silent fallback to the slow path.
  x, experts, _ = inputs()
  with pytest.raises(ConfigError, match="platform='abacus'"):
    grouped(make_plan(PLANS["balanced"]), x, experts, None, "abacus")
  assert {"cpu", "gpu", "tpu"} <= set(GROUPED_MATMULS)
