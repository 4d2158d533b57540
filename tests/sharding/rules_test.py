"""Tests the table of logical axes, and the shardings that follow from it."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from moe_jax.errors import ConfigError
from moe_jax.sharding import (
  RULES,
  batch_sharding,
  constrain,
  make_mesh,
  param_shardings,
  spec,
  use_rules,
)

pytestmark = pytest.mark.unit

SIZES = {"data": 2, "fsdp": 2, "expert": 2, "tensor": 1}


def test_spec_reads_the_table():
  # Catches a rule that is applied to the wrong dimension, and a mesh axis of size 1 that is named.
  assert spec(("expert", "embed", "mlp"), (4, 8, 6), SIZES) == P("expert", "fsdp", None)
  assert spec(("batch", "length", "act_embed"), (8, 3, 4), SIZES) == P(
    ("data", "fsdp", "expert"), None, None
  )
  assert spec(("expert", "group_at_expert"), (4, 8), SIZES) == P("expert", ("data", "fsdp"))


def test_dimensions_that_do_not_divide_stay_whole():
  # Catches a batch of one, as in sampling, that fails on a mesh, and four groups on eight devices
  # that are all copied to each device.
  assert spec(("batch", "length"), (1, 5), SIZES) == P(None, None)
  assert spec(("group",), (4,), SIZES) == P(("data", "fsdp"))
  assert spec(("group",), (6,), SIZES) == P("data")


def test_no_mesh_axis_is_used_twice():
  # Catches P("fsdp", "fsdp"), which JAX refuses.
  assert spec(("embed", "embed"), (4, 4), SIZES) == P(("fsdp", "expert"), None)


def test_unknown_axes_are_errors():
  # Catches a misspelt axis that silently replicates a parameter.
  with pytest.raises(KeyError):
    spec(("embd",), (4,), SIZES)
  assert all(set(axes) <= {"data", "fsdp", "expert", "tensor"} for axes in RULES.values())


def test_a_config_changes_rules_within_a_context_only():
  # Catches a change that outlives its run, and a program that is used again although it was
  # compiled under other rules.
  x, mesh = jnp.zeros((8, 4)), make_mesh({"fsdp": 4, "tensor": 2})
  f = jax.jit(lambda x: constrain(x, "vocab", "embed"))
  with jax.set_mesh(mesh):
    for _ in range(2):
      with use_rules({"vocab": ("tensor", "fsdp"), "embed": ()}):
        assert f(x).sharding.spec == P(("tensor", "fsdp"))
        assert spec(("vocab", "embed"), (8, 4), dict(mesh.shape)) == P(("tensor", "fsdp"), None)
      assert f(x).sharding.spec == P("tensor", "fsdp")


@pytest.mark.parametrize(
  "rules, words",
  [
    ({"vocb": ("tensor",)}, "sharding='vocb': did you mean 'vocab'?"),
    ({"vocab": ("tensr",)}, "sharding.vocab=('tensr',): did you mean 'tensor'?"),
    ({"vocab": "tensor"}, "such as ('tensor',)"),
    ({"heads": ("tensor", "tensor")}, "twice"),
    ({"batch": ("data",)}, "dispatchers and data readers rely on"),
    ({"group_at_expert": ()}, "cannot be changed"),
    ({"embed": ("tensor",)}, "leave some of these out"),
    ({"expert": ("data",)}, "leave some of these out"),
  ],
)
def test_rules_that_nothing_could_follow_are_refused(rules, words):
  # Catches arrays that are silently copied to each device, a batch for which there is no reader,
  # and partial sums that are never added up.
  with pytest.raises(ConfigError) as error:
    use_rules(rules)
  assert words in str(error.value)


def test_constrain_acts_under_set_mesh_only():
  # Catches a constraint that silently does nothing under `jax.set_mesh`.
  x = jnp.zeros((8, 2))
  assert constrain(x, "batch", None) is x
  with jax.set_mesh(make_mesh({"data": 8})):
    assert jax.jit(lambda x: constrain(x, "batch", None))(x).sharding.spec == P("data")


def test_param_shardings_have_the_structure_of_the_unboxed_tree():
  # Catches boxes that are left in the tree, and leaves without a box that are dropped.
  tree = {
    "a": nn.LogicallyPartitioned(jax.ShapeDtypeStruct((4, 6), jnp.float32), names=("embed", "mlp")),
    "b": jax.ShapeDtypeStruct((3,), jnp.float32),
  }
  mesh = make_mesh({"data": 4, "fsdp": 2})
  placed = param_shardings(mesh, tree)
  assert jax.tree.structure(placed) == jax.tree.structure({"a": 0, "b": 0})
  assert placed["a"].spec == P("fsdp", None) and placed["b"].spec == P()
  assert batch_sharding(mesh).spec == P(("data", "fsdp", "expert"))
