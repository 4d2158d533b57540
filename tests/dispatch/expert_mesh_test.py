"""Tests the values, gradients and communication of every dispatcher on meshes.

Training on meshes is tested in parallel_test.
"""

import collections
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.dispatch import DISPATCHERS
from moe_jax.dispatch.expert_mesh import over_mesh, place
from moe_jax.experts import Experts
from moe_jax.routing import RoutingPlan
from moe_jax.sharding import batch_sharding, make_mesh, spec

pytestmark = pytest.mark.conformance

G, S, K, E, D, F, C = 8, 8, 2, 8, 8, 12, 2
MESHES = (("expert", 8),), (("data", 2), ("expert", 4)), (("fsdp", 2), ("expert", 2), ("tensor", 2))
PADDED = {
  "ragged_all_to_all": functools.partial(DISPATCHERS["ragged_all_to_all"], exchange="padded")
}
# The collectives of floats in the forward and backward pass. The all-reduces sum the gradients of
# the weights.
SENDS = dict.fromkeys(
  ("einsum", "scatter", "all_to_all", "ragged_all_to_all"), {"all-to-all", "all-reduce"}
)
SENDS |= dict.fromkeys(("all_gather", "grouped"), {"all-gather", "reduce-scatter", "all-reduce"})


@functools.cache
def inputs(groups=G):
  """Returns (plan, x, experts, d_y) with uneven loads, which overflow C slots.

  Some assignments name no expert, and the experts have gates and all biases.
  """
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape) / 2, jnp.float32)

  experts = Experts(
    normal(E, D, F), normal(E, F, D), normal(E, D, F), "clamped_swiglu", normal(E, F), "additive"
  )
  experts = experts.replace(up_bias=normal(E, F), gate_bias=normal(E, F), down_bias=normal(E, D))
  scores = np.log(np.geomspace(4, 0.5, E + 1)) + rng.gumbel(size=(groups, S, E + 1))
  expert = (
    np.argsort(-scores, axis=-1)[..., :K].swapaxes(1, 2).reshape(groups, K * S).astype(np.int32)
  )
  gate = rng.uniform(0.1, 1, expert.shape).astype(np.float32) * (expert < E)
  plan = RoutingPlan(
    token=np.tile(np.tile(np.arange(S, dtype=np.int32), K), (groups, 1)),
    expert=expert,
    gate=gate,
    num_experts=E,
  )
  return plan, normal(groups, S, D), experts, normal(groups, S, D)


@functools.cache
def compiled(name, sizes, capacity, groups):
  """Returns a compiled function and its operands on the mesh with these sizes.

  The function maps (plan, x, experts, d_y) to (y, d_gate, d_x, d_experts). The platform is "tpu",
  because `jax.lax.ragged_dot` compiles faster than the loops for CPUs, which parallel_test runs.
  """

  def run(plan, x, experts, d_y):
    dispatch = PADDED.get(name, DISPATCHERS[name])
    y, pull = jax.vjp(
      lambda g, x, e: dispatch(plan.replace(gate=g), x, e, capacity, "tpu"), plan.gate, x, experts
    )
    return y, *pull(d_y)

  mesh, (plan, x, experts, d_y) = make_mesh(dict(sizes)), inputs(groups)
  rows = batch_sharding(mesh) if groups == G else NamedSharding(mesh, PartitionSpec())
  weights = jax.tree.map(
    lambda leaf, axes: jax.device_put(
      leaf, NamedSharding(mesh, spec(axes, leaf.shape, dict(mesh.shape)))
    ),
    experts,
    experts.axes,
  )
  with jax.set_mesh(mesh):
    operands = (*jax.device_put((plan, x), rows), weights, jax.device_put(d_y, rows))
    return tiny.quick_jit(run).lower(*operands).compile(), operands


def assert_as_on_one_device(name, sizes, capacity=C, groups=G):
  run, operands = compiled(name, sizes, capacity, groups)
  alone, expected = compiled("einsum", (("data", 1),), capacity, groups)
  # Gradients of gates whose assignments name no expert are not compared.
  named = np.asarray(operands[0].expert) < E
  for actual, wanted in zip(
    jax.tree.leaves(run(*operands)), jax.tree.leaves(alone(*expected)), strict=True
  ):
    mask = named if wanted.shape == named.shape else 1.0
    np.testing.assert_allclose(
      np.asarray(actual) * mask, np.asarray(wanted) * mask, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
  "name, sizes",
  [(name, MESHES[1]) for name in DISPATCHERS]
  + [(name, MESHES[0]) for name in ("all_to_all", "ragged_all_to_all")],
)
def test_any_mesh_computes_the_same(name, sizes):
  # Catches slots that are filled in the order of devices instead of the plan, rows that are
  # returned to tokens of another device, experts that are renumbered wrongly, gradients of weights
  # or gates that come from one device only, and the bias of an expert of another device.
  assert_as_on_one_device(name, sizes)


@pytest.mark.parametrize("name", ["all_to_all", "ragged_all_to_all", "grouped"])
def test_dropless_with_weights_split_over_fsdp_and_tensor(name):
  # Catches partial sums over "tensor" that are added up twice or not at all, biases of outputs that
  # are added once for each shard, and shards of weights that are gathered along the wrong axis.
  assert_as_on_one_device(name, MESHES[2], capacity=None)


@pytest.mark.parametrize("name", ["all_to_all", "all_gather"])
def test_groups_that_the_mesh_does_not_divide(name):
  # Two groups on a mesh of data=2 and expert=4 have four copies each. Catches results that are
  # counted once for each copy.
  assert_as_on_one_device(name, MESHES[1], groups=2)


@pytest.mark.parametrize("name", DISPATCHERS)
def test_what_is_sent(name):
  # Catches buffers of tokens that GSPMD gathers on all devices (as it does with a single
  # constraint), weights that are gathered by a dispatcher that moves tokens, and tokens that are
  # moved by the dispatcher that gathers weights.
  sent = floats(compiled(name, MESHES[1], C, G)[0].as_text())
  assert set(sent) == SENDS[name]
  if name in (
    "einsum",
    "scatter",
    "all_to_all",
  ):  # there and back, in the forward and backward pass
    assert sent["all-to-all"] == 4 * G // 8 * E * C * D


def floats(text):
  """Returns the number of floats in the results of a module's collectives, by kind."""
  total = collections.Counter()
  for shapes, kind in re.findall(
    r"= (.*?) (all-gather|all-to-all|all-reduce|reduce-scatter|collective\S*)\(", text
  ):
    total[kind] += sum(
      math.prod(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", shapes)
    )
  return {kind: count for kind, count in total.items() if count}


def test_the_backward_pass_gathers_weights_again():
  # Catches gathered weights, or their casts to bfloat16, that are kept from the forward pass to the
  # backward pass.
  plan, x, experts, _ = inputs()

  def f(x, e):
    return DISPATCHERS["all_to_all"](plan, x, e, C, "cpu")

  with jax.set_mesh(make_mesh({"fsdp": 4, "expert": 2})):
    kept = jax.tree.leaves(
      jax.eval_shape(lambda *a: jax.vjp(f, *a)[1], x.astype(jnp.bfloat16), experts)
    )
  weights = [leaf for leaf in kept if leaf.shape[-2:] in ((D, F), (F, D))]
  assert weights and all(leaf.shape[0] == E and leaf.dtype == jnp.float32 for leaf in weights)


def test_place():
  # Catches an axis with one device that is not left out, and weights that stay split over an axis
  # that does not split the tokens, because then nothing would gather them.
  experts = inputs()[2]
  where = place(8, experts, {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2})
  assert (where.tokens, where.expert, where.tensor) == (("fsdp", "expert"), 2, True)
  assert where.weights.up == PartitionSpec("expert", "fsdp", "tensor")
  assert where.weights.hidden_bias == PartitionSpec("expert", "tensor")
  assert where.weights.down_bias == PartitionSpec("expert", "fsdp")
  where = place(1, experts, {"data": 2, "fsdp": 2, "expert": 2, "tensor": 1})
  assert (where.tokens, where.expert, where.tensor) == ((), 2, False)
  assert where.weights.down == PartitionSpec("expert", None, None)


def test_without_a_mesh_nothing_is_exchanged():
  # Catches a collective, or a shard_map, on one device.
  plan, x, experts, _ = inputs()

  def double(plan, x, experts):
    return 2 * x

  np.testing.assert_array_equal(over_mesh(double, None, plan, x, experts), 2 * x)
  with jax.set_mesh(make_mesh({"data": 1})):
    assert "shard_map" not in str(
      jax.make_jaxpr(lambda x: over_mesh(double, None, plan, x, experts))(x)
    )
