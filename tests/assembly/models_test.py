"""The model is built as the config says."""

import jax
import jax.numpy as jnp
import pytest
import tiny
from changed import config

from moe_jax import accounts, assembly, sharding
from moe_jax.dispatch import DISPATCHERS
from moe_jax.errors import ConfigError
from moe_jax.layers import Attention, AttentionOptions, LatentAttention, LatentOptions
from moe_jax.routing import ROUTERS

pytestmark = pytest.mark.unit


R, W = "model.moe.router", "model.moe.dispatcher"


def test_vocabulary():
  # Catches an embedding that is smaller than the tokenizer's vocabulary.
  mesh = sharding.make_mesh({"data": 1})
  assert assembly.model(config(), 264, mesh).vocab_size == 264
  assert assembly.model(config({"model.vocab_size": 512}), 264, mesh).vocab_size == 512
  with pytest.raises(ConfigError, match="model.vocab_size=100"):
    assembly.model(config({"model.vocab_size": 100}), 264, mesh)


@pytest.mark.parametrize("family", assembly.FAMILIES)
def test_the_seed_arrives_in_every_family(family):
  # Catches a family in which routers without weights are the same for all seeds.
  block = ("attention", "moe") if family == "brainformer" else ()
  c = config({"seed": 7, "model.family": family, "model.block": block})
  assert assembly.model(c, 264, sharding.make_mesh({"data": 1})).seed == 7


def test_every_key_of_attention_arrives():
  # Catches a key of the config that is not read.
  keys = {
    "position": "relative",
    "relative_buckets": 8,
    "relative_max_distance": 9,
    "qkv_bias": True,
    "qk_norm": True,
    "clip_qkv": 8.0,
    "sliding_window": 7,
    "query_scale": 0.5,
    "rope_theta": 5e5,
    "num_kv_heads": 2,
  }
  mesh = sharding.make_mesh({"data": 1})
  changes = {f"model.{key}": value for key, value in keys.items()} | {"model.norm_eps": 1e-3}
  made = assembly.model(config(changes), 264, mesh).block.keywords["attention"]
  assert made.func is Attention and made.keywords["options"] == AttentionOptions(**keys)
  assert made.keywords["norm_eps"] == 1e-3
  widths = {"kv_rank": 6, "query_rank": 5, "nope_dim": 4, "rope_dim": 2, "value_dim": 3}
  latent = {"model.attention": "latent", "model.rope_theta": 5e5, "model.num_heads": 7}
  latent |= {f"model.latent.{key}": value for key, value in widths.items()}
  made = assembly.model(config(latent), 264, mesh).block.keywords["attention"]
  assert made.func is LatentAttention and made.keywords["options"] == LatentOptions(**widths)
  assert made.keywords["rope_theta"] == 5e5 and made.keywords["num_heads"] == 7


def test_an_encoder_with_a_priority_of_its_own():
  # Catches batch-prioritised routing in the decoder, where it would look ahead, or in neither
  # tower, and a config that building a model changes.
  c = config(
    {
      "model.family": "encoder_decoder",
      "data.objective": "span_corruption",
      "model.moe.router.name": "st_moe",
      "model.moe.encoder_priority": "gate",
    }
  )
  assembly.validate(c)
  model = assembly.model(c, 264, sharding.make_mesh({"data": 1}))

  def of(tower):
    return tower.keywords["block"].keywords["moe"].keywords["router"].keywords["priority"]

  assert (of(model.encoder), of(model.decoder)) == ("gate", "choice")
  assert "priority: gate" in accounts.routing_summary(
    c
  ) and "priority: choice" in accounts.routing_summary(c)
  assert c.model.moe.router.st_moe.priority == "choice"


def test_stacks_of_an_encoder_decoder():
  # Catches a causal encoder, positions in cross-attention, missing dropout of attention weights,
  # layers of one tower in the other, and wrong numbers of additions to the residual stream. The
  # encoder has 2 * 3 and 2 extra ones, which are 8, and the decoder has 3 * 2 and 1 extra one.
  c = config(
    {
      "model.family": "encoder_decoder",
      "model.num_encoder_layers": 3,
      "model.num_layers": 2,
      "model.position": "relative",
      "model.dropout": 0.1,
      "model.moe.first": 1,
      "model.moe.every": 1,
      "model.moe.extra_ffn": True,
      "data.objective": "span_corruption",
    }
  )
  model = assembly.model(c, 264, sharding.make_mesh({"data": 1}))
  assert model.encoder_experts == (False, True, True) and model.decoder_experts == (False, True)
  encoder, decoder = (tower.keywords["block"].keywords for tower in (model.encoder, model.decoder))
  assert [t["attention"].keywords["causal"] for t in (encoder, decoder)] == [False, True]
  assert encoder["cross"] is None and decoder["cross"].keywords["dropout"] == 0.1
  positions = [decoder[part].keywords["options"].position for part in ("attention", "cross")]
  assert positions == ["relative", "none"]
  for tower, additions in ((encoder, 8), (decoder, 7)):
    assert {tower[part].keywords["output_scale"] for part in ("attention", "dense", "moe")} == {
      additions**-0.5
    }
  assert encoder["moe"].keywords["router"].keywords["priority"] == "choice"
  with pytest.raises(ConfigError, match="model.target_vocab_size=100"):
    assembly.model(
      config({"model.family": "encoder_decoder", "model.target_vocab_size": 100}),
      264,
      sharding.make_mesh({"data": 1}),
    )


def test_lstms_are_projected_to_the_width_of_the_model():
  # Catches lstm_units that are not read, and a projection between equal widths.
  mesh = sharding.make_mesh({"data": 1})
  for units, made, projected in ((0, 128, 0), (128, 128, 0), (96, 96, 128)):
    model = assembly.model(
      config({"model.family": "lstm", "model.lstm_units": units, "model.dropout": 0.1}), 264, mesh
    )
    lstm = model.block.keywords["lstm"].keywords
    assert {key: lstm[key] for key in ("units", "projected")} == {
      "units": made,
      "projected": projected,
    }
    assert model.dropout == 0.1 and model.has_experts == (False, True, False, True)


def test_additions_to_the_residual_stream_are_counted():
  # There are 4 layers, of which 2 have experts. Catches extra FFNs that make the variance of the
  # residual stream exceed 1 at the start.
  mesh = sharding.make_mesh({"data": 1})
  for extra, additions in ((False, 8), (True, 10)):
    model = assembly.model(config({"model.moe.extra_ffn": extra}), 264, mesh)
    parts = model.block.keywords
    assert parts["extra_ffn"] == extra
    scales = {parts[name].keywords["output_scale"] for name in ("attention", "dense", "moe")}
    assert scales == {additions**-0.5}


@pytest.mark.parametrize(
  "router, dispatcher",
  tiny.often(
    {
      *((router, "einsum") for router in ROUTERS),
      *(("top_k", dispatcher) for dispatcher in DISPATCHERS),
    },
    [(router, dispatcher) for router in ROUTERS for dispatcher in DISPATCHERS],
  ),
)
def test_every_choice_builds_and_traces(router, dispatcher):
  # Catches a router or dispatcher that is in its table but does not work in a model.
  c = config(
    {
      f"{R}.name": router,
      f"{W}.name": dispatcher,
      "model.moe.allow_noncausal_routing": True,
      "model.num_layers": 1,
      "model.moe.first": 0,
      "model.moe.num_experts": 16,
      "model.moe.threshold_loss": float(router == "strictly_balanced"),
    }
  )
  assembly.validate(c)
  model = assembly.model(c, 264, sharding.make_mesh({"data": 1}))
  ids = jax.ShapeDtypeStruct((2, 16), jnp.int32)
  shapes = jax.eval_shape(
    lambda key, ids: tiny.at_first(model, key, ids, ids, ids, train=False), jax.random.key(0), ids
  )
  assert shapes[0].shape == (2, 16, 264) and shapes[1].metrics["load"].shape == (1, 16)
