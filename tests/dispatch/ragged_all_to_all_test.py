"""Tests the ragged dispatcher's choice of exchange and its numbering of received rows.

`conformance_test` and `expert_mesh_test` do the rest.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dispatch import ragged_all_to_all
from moe_jax.dispatch.ragged_all_to_all import _is_ragged, local_experts
from moe_jax.errors import ConfigError
from moe_jax.experts import Experts
from moe_jax.routing import RoutingPlan
from moe_jax.sharding import make_mesh

pytestmark = pytest.mark.unit

G, S, E, D, F = 4, 4, 4, 2, 3


def lowered(platform, **options):
  """Returns the StableHLO of a forward and backward pass for `platform` on a mesh of expert=4."""
  plan = RoutingPlan(
    token=jnp.tile(jnp.arange(S), (G, 1)),
    expert=jnp.zeros((G, S), int),
    gate=jnp.ones((G, S)),
    num_experts=E,
  )
  experts = Experts(jnp.ones((E, D, F)), jnp.ones((E, F, D)), None, "relu")

  def f(x, experts):
    return jnp.sum(ragged_all_to_all(plan, x, experts, None, platform, **options))

  with jax.set_mesh(make_mesh({"expert": 4})):
    return (
      jax.jit(jax.value_and_grad(f, argnums=(0, 1)))
      .trace(jnp.ones((G, S, D)), experts)
      .lower(lowering_platforms=(platform,))
      .as_text()
    )


def test_the_exchange_suits_the_platform():
  # There are four exchanges: there and back in the forward pass and in the backward pass. Catches a
  # choice by the platform of the host, and JAX's own derivative of the operation, which exchanges
  # the offsets again.
  on_tpu, on_cpu, padded = lowered("tpu"), lowered("cpu"), lowered("tpu", exchange="padded")
  assert on_tpu.count("ragged_all_to_all") == 4 and "stablehlo.all_to_all" not in on_tpu
  assert "ragged_all_to_all" not in on_cpu + padded
  assert on_cpu.count('"stablehlo.all_to_all"') == padded.count('"stablehlo.all_to_all"') == 4


def test_the_exchange_suits_the_kind_of_chip():
  # Routing between the chips of a large v5e slice is limited. Catches a choice by the name of the
  # platform alone, which is the same for all TPUs.
  for kind, ragged in (("TPU v5 lite", False), ("TPU v5p", True)):
    chip = jax.sharding.AbstractDevice(kind, 1, "tpu")
    mesh = jax.sharding.AbstractMesh((32,), ("expert",), abstract_device=chip)
    with jax.sharding.use_abstract_mesh(mesh):
      assert _is_ragged("auto", "tpu") == ragged


def test_local_experts():
  # There are two sources and two local experts. The first source sends 2 rows to expert 0 and 1 row
  # to expert 1, and the second source sends 2 rows to expert 1. Catches rows that are sorted by
  # expert over all sources, and unused rows that name an expert.
  np.testing.assert_array_equal(
    local_experts(jnp.array([[2, 1], [0, 2]]), 7), [0, 0, 1, 1, 1, 2, 2]
  )


def test_an_unknown_platform_is_named():
  # Catches a platform without an implementation that is only detected during compilation.
  with pytest.raises(ConfigError, match="platform='quantum'"):
    lowered("quantum")


def test_an_unknown_exchange_is_named():
  # Catches a misspelt option that silently means "padded".
  with pytest.raises(ConfigError, match="exchange='raged'"):
    lowered("cpu", exchange="raged")
