"""Tests `moe_jax.moe_layer`, the layer for a module of one's own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import moe_jax
from moe_jax import assembly
from moe_jax.assembly.sections import FUNCTIONS, default_config
from moe_jax.layers import DenseFfn, MoeLayer
from moe_jax.routing import ROUTERS, Router

pytestmark = pytest.mark.unit

X = jax.random.normal(jax.random.key(0), (2, 8, 16))


def apply(layer):
  """Returns the output and the `Aux` of a layer with random weights."""
  draw = np.random.default_rng(0)
  shapes = nn.unbox(jax.eval_shape(layer.init, jax.random.key(1), X))
  weights = jax.tree.map(
    lambda leaf: jnp.asarray(draw.normal(size=leaf.shape), jnp.float32), shapes
  )
  return layer.apply(weights, X)


def test_a_layer_works_inside_a_module():
  # Catches a layer that cannot be called with an array alone, and losses without a weight.
  class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
      layer = moe_jax.moe_layer(4, 8, "top_k", {"k": 2}, balance_loss=0.5, z_loss=0.0)
      y, aux = layer(x)
      return x + y, layer.losses.total(aux.losses), aux.losses.get("balance")

  y, total, balance = apply(Block())
  assert y.shape == X.shape and float(jnp.abs(y - X).max()) > 0
  np.testing.assert_allclose(total, 0.5 * balance)


def test_it_is_the_layer_of_a_config():
  # Catches an option that does not arrive, and a fact about the router that is missing.
  config = default_config()
  values = {"num_experts": 4, "d_ff": 8, "jitter": 0.1, "group_rows": 2, "importance_loss": 0.1}
  config.model.moe.update(values)
  config.model.moe.router.name = "noisy_top_k"
  dense = functools.partial(DenseFfn, output_scale=1.0, dtype=jnp.float32)
  wanted = assembly.experts.moe_layer(config.model, dense, "cpu")()
  layer = moe_jax.moe_layer(
    4,
    8,
    "noisy_top_k",
    activation=config.model.activation,
    **{name: value for name, value in values.items() if name not in ("num_experts", "d_ff")},
  )
  for field in dataclasses.fields(MoeLayer):
    if field.name in ("router", "dispatcher"):
      partials = getattr(layer, field.name), getattr(wanted, field.name)
      assert len({(each.func, str(each.keywords)) for each in partials}) == 1, field.name
    elif field.name == "facts":
      assert (layer.facts.k, layer.facts.load.func) == (wanted.facts.k, wanted.facts.load.func)
    elif field.name not in ("parent", "name"):
      assert getattr(layer, field.name) == getattr(wanted, field.name), field.name


def test_a_router_of_ones_own():
  # Catches a Router value that is taken for a name, and one that is registered at each call.
  before = dict(ROUTERS)
  own = Router(lambda logits, context: ROUTERS["top_k"].route(logits, context, k=1), "no")
  try:
    first = moe_jax.moe_layer(4, 8, own)
    assert apply(first)[0].shape == X.shape
    moe_jax.moe_layer(4, 8, own)
    assert len(ROUTERS) == len(before) + 1
  finally:
    for name in ROUTERS.keys() - before.keys():
      del ROUTERS[name]
      del FUNCTIONS["model.moe.router"][name]


@pytest.mark.parametrize(
  "arguments, words",
  [
    ({"router": "topk"}, "did you mean 'top_k'"),
    ({"router_options": {"kk": 1}}, "kk=1: there is no such option; known: gate_norm, k"),
    ({"router_options": {"gate_norm": "sum"}}, "gate_norm='sum'"),
    ({"capcity_factor": 1.0}, "did you mean 'capacity_factor'"),
    ({"capacity_factor": -1.0}, "capacity_factor=-1.0"),
    ({"balancing": {"rule": "sign"}}, "option='balancing'"),
    ({"dispatcher": "group"}, "did you mean 'grouped'"),
    ({"router": "expert_choice", "copy_experts": 1}, "copy_experts=1: tokens of the router"),
  ],
)
def test_a_mistake_is_one_sentence(arguments, words):
  # Catches an option that is ignored, and a mistake that only a compiler finds.
  with pytest.raises(moe_jax.ConfigError, match=words):
    moe_jax.moe_layer(4, 8, **arguments)
