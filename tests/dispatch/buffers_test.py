import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moe_jax import assembly, sharding
from moe_jax.dispatch import einsum, fit_buffers, ragged_all_to_all
from moe_jax.dispatch.buffers import _fits, buffer_rows
from moe_jax.dispatch.grouped import drop_groups
from moe_jax.experts import Experts
from moe_jax.routing import RoutingPlan

pytestmark = pytest.mark.numerics

G, S, E, D, F, K = 8, 6, 8, 4, 6, 2
MESH = {"data": 2, "expert": 4}


def make_plan(seed=0):
  """Returns a plan in which the first experts, which live on one device, are popular."""
  rng = np.random.default_rng(seed)
  popular = np.argsort(-(np.log([8, 8, 1, 1, 1, 1, 1, 1]) + rng.gumbel(size=(G, S, E))), axis=-1)
  return RoutingPlan(
    token=jnp.tile(jnp.arange(S), (G, K)),
    expert=jnp.asarray(popular[:, :, :K].swapaxes(1, 2).reshape(G, K * S), jnp.int32),
    gate=jnp.asarray(rng.uniform(0.1, 1.0, (G, K * S)), jnp.float32),
    num_experts=E,
  )


def by_hand(plan, factor):
  """Returns the experts after dropping: the best gates of each ring and device stay."""
  expert, gate = np.array(plan.expert), np.asarray(plan.gate)
  room = int(np.ceil(factor * K * S))
  # A device has one group here, and a ring the groups of one place on the axis "data".
  for ring in (range(4), range(4, 8)):
    rows = [(g, a) for g in ring for a in range(K * S)]
    for device in range(4):
      there = [row for row in rows if plan.expert[row] // 2 == device]
      for row in sorted(there, key=lambda row: -gate[row])[room:]:
        expert[row] = E
  return expert


def test_rows_of_a_buffer():
  # Catches a buffer that is rounded down, and one that is larger than the worst case.
  assert buffer_rows(None, 10, 40) == 40
  assert buffer_rows(1.25, 10, 40) == 13 and buffer_rows(9.0, 10, 40) == 40


def test_the_lowest_gates_do_not_fit():
  # By hand: device 0 gets four rows and has room for two. Catches rows that are kept by their place
  # instead of their gate, and assignments to nobody that take room.
  device = jnp.array([0, 0, 1, 0, 2, 0, 9])
  gate = jnp.array([0.1, 0.9, 0.2, 0.5, 0.3, 0.4, 1.0])
  found = _fits(device, gate, 3, 2)
  assert found.tolist() == [False, True, True, True, True, False, False]


@pytest.mark.parametrize("factor", [0.25, 1.0, 1.5])
def test_drops_are_those_of_a_ring(factor):
  # Catches rings that are mixed up, a device that only looks at its own rows, and gates of dropped
  # assignments that stay.
  plan = make_plan()
  with jax.set_mesh(sharding.make_mesh(MESH)):
    found = jax.jit(lambda plan: fit_buffers(plan, factor))(plan)
  expected = by_hand(plan, factor)
  assert 0 < (expected == E).mean() < 0.8
  np.testing.assert_array_equal(found.expert, expected)
  np.testing.assert_array_equal(found.gate, np.where(expected < E, plan.gate, 0))


def test_nothing_is_dropped_without_an_exchange():
  # Catches a model that drops tokens on one device because a pod would.
  plan = make_plan()
  assert fit_buffers(plan, 0.1) is plan
  with jax.set_mesh(sharding.make_mesh({"data": 8})):
    assert fit_buffers(plan, 0.1) is plan
  with jax.set_mesh(sharding.make_mesh(MESH)):
    assert fit_buffers(plan, None) is plan


@pytest.mark.parametrize("capacity", tiny.often({3}, [None, 3]))
def test_values_and_gradients_are_those_of_the_rows_that_fit(capacity):
  # Catches rows that overflow into those of another device, a gradient for a row that was not
  # computed, and a capacity that is applied after the buffer.
  rng = np.random.default_rng(1)
  plan, x = make_plan(), jnp.asarray(rng.normal(size=(G, S, D)), jnp.float32)
  up, down = (jnp.asarray(rng.normal(size=s) / 2, jnp.float32) for s in ((E, D, F), (E, F, D)))
  experts = Experts(up, down, None, "gelu")

  def both(dispatcher, plan, **options):
    def f(x, gate, experts):
      y = dispatcher(plan.replace(gate=gate), x, experts, capacity, "tpu", **options)
      return jnp.sum(jnp.sin(y)), y

    return jax.jit(jax.grad(f, argnums=(0, 1, 2), has_aux=True))(x, plan.gate, experts)

  with jax.set_mesh(sharding.make_mesh(MESH)):
    found = both(ragged_all_to_all, plan, buffer_factor=0.75, exchange="padded")
    kept = fit_buffers(drop_groups(plan, capacity), 0.75)
  expected = both(einsum, kept)
  served = kept.expert < E
  assert 0.2 < served.mean() < 0.95
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5),
    (found[0][0], jnp.where(served, found[0][1], 0), found[0][2], found[1]),
    (expected[0][0], jnp.where(served, expected[0][1], 0), expected[0][2], expected[1]),
  )


def test_the_buffer_has_the_rows_that_it_may_have():
  # Catches an option that drops rows and allocates the worst case all the same.
  plan = make_plan()
  experts = Experts(jnp.ones((E, D, F)), jnp.ones((E, F, D)), None, "relu")

  def program(factor):
    with jax.set_mesh(sharding.make_mesh(MESH)):
      return str(
        jax.make_jaxpr(
          lambda x: ragged_all_to_all(plan, x, experts, None, "tpu", buffer_factor=factor)
        )(jnp.ones((G, S, D)))
      )

  # The hidden units of the received rows: four devices send at most all their 12 rows.
  assert f"f32[48,{F}]" in program(None)
  assert f"f32[48,{F}]" not in program(1.25) and f"f32[15,{F}]" in program(1.25)


def test_the_layer_counts_what_did_not_fit(tmp_path):
  # Catches drops that no metric shows, and an option that the layer does not pass on.
  def drop_rate(factor):
    config = tiny.config(
      tmp_path,
      model__moe__dispatcher__name="ragged_all_to_all",
      model__moe__dispatcher__ragged_all_to_all__buffer_factor=factor,
      mesh__data=1,
      mesh__expert=4,
    )
    mesh = sharding.make_mesh(dict(config.mesh))
    model = assembly.model(config, 264, mesh)
    tokens = jnp.tile(jnp.arange(config.data.seq_len), (4, 1))
    batch = tokens, jnp.ones_like(tokens), tokens
    with jax.set_mesh(mesh), sharding.use_rules(dict(config.sharding)):
      _, aux = jax.jit(lambda *batch: tiny.at_first(model, jax.random.key(0), *batch, train=False))(
        *batch
      )
    return float(jnp.max(aux.metrics["drop_rate"]))

  assert drop_rate(None) == 0.0
  assert 0.3 < drop_rate(0.5) < 0.9
