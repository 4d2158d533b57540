"""The model of a config."""

import jax
import jax.numpy as jnp
import pytest
from changed import config

from moe_jax import build, sharding
from moe_jax.dispatch import DISPATCHERS
from moe_jax.errors import ConfigError
from moe_jax.routing import ROUTERS

pytestmark = pytest.mark.unit


R, W = "model.moe.router", "model.moe.dispatcher"


def test_vocabulary():
  # Catches: an embedding smaller than the tokenizer.
  mesh = sharding.make_mesh({"data": 1})
  assert build.model(config(), 264, mesh).vocab_size == 264
  assert build.model(config({"model.vocab_size": 512}), 264, mesh).vocab_size == 512
  with pytest.raises(ConfigError, match="model.vocab_size=100"):
    build.model(config({"model.vocab_size": 100}), 264, mesh)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_every_choice_builds_and_traces(router, dispatcher):
  # Catches: a router or dispatcher that the tables list and the model cannot hold.
  c = config({f"{R}.name": router, f"{W}.name": dispatcher, "model.moe.allow_noncausal_routing": True,
              "model.num_layers": 1, "model.moe.first": 0, "model.moe.num_experts": 16,
              "model.moe.threshold_loss": float(router == "strictly_balanced")})
  build.validate(c)
  model = build.model(c, 264, sharding.make_mesh({"data": 1}))
  ids = jax.ShapeDtypeStruct((2, 16), jnp.int32)
  shapes = jax.eval_shape(lambda key, ids: model.init_with_output(key, ids, ids, ids, train=False)[0],
                          jax.random.key(0), ids)
  assert shapes[0].shape == (2, 16, 264) and shapes[1].metrics["load"].shape == (1, 16)
