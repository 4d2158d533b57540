"""The layers with experts are built as the config says."""

import jax
import jax.numpy as jnp
import pytest
import tiny
from changed import config

from moe_jax import assembly, sharding
from moe_jax.dispatch import CapacityOptions

pytestmark = pytest.mark.unit


R = "model.moe.router"


def test_loss_weights_name_what_the_model_reports():
  # Catches a loss that is computed but has no weight, and one that has a weight but is not computed
  # (which would be a KeyError in the first step).
  c = config({"model.moe.z_loss": 0.0, "model.moe.load_loss": 0.5})
  assert assembly.loss_weights(c) == {"balance": 0.01, "load": 0.5}
  model = assembly.model(c, 264, sharding.make_mesh({"data": 1}))
  ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)

  def run(key, ids):
    return tiny.at_first(model, key, ids, ids, ids, train=False)[1].losses

  assert set(jax.eval_shape(run, jax.random.key(0), ids)) == {"balance", "load"}
  assert assembly.loss_weights(config({"model.moe.num_experts": 0})) == {}


@pytest.mark.parametrize("soft_slots", [0, 1])
def test_experts_have_an_activation_of_their_own(soft_slots):
  # Catches dense FFNs that use the experts' activation (GLaM's dense FFNs are gated, and its
  # experts are not), and shared experts that do not use it.
  changes = {
    "model.ffn_bias": "additive",
    "model.moe.num_shared_experts": 1,
    "model.moe.soft_slots": soft_slots,
    "model.moe.expert_bias": True,
  }
  for own, expected in (("", "swiglu"), ("gelu", "gelu")):
    c = config(changes | {"model.moe.activation": own})
    parts = assembly.model(c, 264, sharding.make_mesh({"data": 1})).block.keywords
    moe = parts["moe"].keywords
    made = (parts["dense"].keywords, moe, moe["shared"].keywords)
    assert [part["activation"] for part in made] == ["swiglu", expected, expected]
    assert all(part["ffn_bias"] == "additive" for part in made) and moe["expert_bias"]


def test_expert_choice_sizes_its_own_slots():
  # Catches a capacity of the layer that drops what the router has chosen, and dropless buffers of S
  # slots.
  c = config(
    {
      f"{R}.name": "expert_choice",
      f"{R}.expert_choice.capacity_factor": 3,
      "model.moe.capacity_factor": 0.1,
    }
  )
  layer = assembly.model(c, 264, sharding.make_mesh({"data": 1})).block.keywords["moe"].keywords
  assert layer["capacity"] == CapacityOptions(3.0)
