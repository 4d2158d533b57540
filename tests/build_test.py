"""Configs become objects, and wrong ones a sentence that names field, value and remedy."""

import functools

import jax
import jax.numpy as jnp
import pytest

from configs import base
from moe_jax import build, sharding
from moe_jax.dispatch import DISPATCHERS
from moe_jax.errors import ConfigError
from moe_jax.routing import ROUTERS

pytestmark = pytest.mark.unit


def config(changes=()):
  c = base.get_config()
  for field, value in dict(changes).items():
    *parents, key = field.split(".")
    with c.unlocked(), c.ignore_type():
      functools.reduce(lambda node, name: node[name], parents, c)[key] = value
  return c


def test_the_base_config_is_valid():
  # Catches: a check that refuses the default.
  for devices in (None, 1, 2, 8):
    build.validate(config(), devices)


R, W = "model.moe.router", "model.moe.dispatcher"
WRONG = [  # changes, the field that is blamed, words of the remedy
    ({f"{R}.name": "swich"}, f"{R}.name", "top_k, expert_choice"),
    ({f"{R}.name": "expert_choise"}, f"{R}.name", "did you mean 'expert_choice'"),
    ({f"{W}.name": "groupd"}, f"{W}.name", "did you mean 'grouped'"),
    ({"model.family": "decodr"}, "model.family", "'decoder'"),
    ({"model.activation": "swigelu"}, "model.activation", "'swiglu'"),
    ({"model.norm": "rms_norm"}, "model.norm", "'rmsnorm'"),
    ({"model.dtype": "bfloat"}, "model.dtype", "'bfloat16'"),
    ({"model.remat": "ful"}, "model.remat", "'full'"),
    ({"optimizer.name": "adamW"}, "optimizer.name", "'adamw'"),
    ({"optimizer.schedule": "cosin"}, "optimizer.schedule", "'cosine'"),
    ({"model.moe.capacity_basis": "token"}, "model.moe.capacity_basis", "'tokens'"),
    ({"model.moe.balance_counts": "top1"}, "model.moe.balance_counts", "'top_1'"),
    ({"model.moe.balance_over": "groups"}, "model.moe.balance_over", "'group'"),
    ({"model.moe.layer_reduce": "avg"}, "model.moe.layer_reduce", "mean, sum"),
    ({"data.pipeline": "window"}, "data.pipeline", "'windows'"),
    ({"data.sources": (1, "embedded:prose")}, "data.sources", "1 in it must be a string"),
    ({"data.weights": ("a", 1.0)}, "data.weights", "'a' in it must be a number"),
    ({f"{R}.top_k.k": 9}, f"{R}.top_k.k", "num_experts=8"),
    ({f"{R}.top_k.k": 0}, f"{R}.top_k.k", "between 1"),
    ({f"{R}.top_k.k": 2.0}, f"{R}.top_k.k", "type int"),
    ({f"{R}.top_k.kk": 2}, f"{R}.top_k.kk", "did you mean 'k'"),
    ({f"{R}.top_k.gate_norm": "topk"}, f"{R}.top_k.gate_norm", "top_k"),
    ({f"{R}.top_k.priority": "gates"}, f"{R}.top_k.priority", "gate"),
    ({f"{R}.top_k.k": 1}, f"{R}.top_k.gate_norm", "'none'"),
    ({f"{R}.top_k.priority": "gate"}, f"{R}.name", "allow_noncausal_routing"),
    ({f"{R}.name": "expert_choice"}, f"{R}.name", "allow_noncausal_routing"),
    ({f"{R}.name": "expert_choice", f"{R}.expert_choice.capacity_factor": -1.0},
     f"{R}.expert_choice.capacity_factor", "> 0"),
    ({"model.num_kv_heads": 3}, "model.num_kv_heads", "num_heads=4"),
    ({"model.head_dim": 31}, "model.head_dim", "even"),
    ({"model.d_model": 0}, "model.d_model", "at least 1"),
    ({"model.num_layers": -2}, "model.num_layers", "at least 1"),
    ({"model.dropout": 1.0}, "model.dropout", "below 1"),
    ({"model.moe.jitter": -0.1}, "model.moe.jitter", "at least 0"),
    ({"model.moe.capacity_factor": 0.0}, "model.moe.capacity_factor", "above 0"),
    ({"model.moe.eval_capacity_factor": -1.0}, "model.moe.eval_capacity_factor", "above 0"),
    ({"model.moe.balance_loss": -0.01}, "model.moe.balance_loss", "at least 0"),
    ({"model.moe.z_loss": float("nan")}, "model.moe.z_loss", "at least 0"),
    ({"model.moe.first": 4}, "model.moe.first", "num_experts=0"),
    ({"model.moe.group_size": 100}, "model.moe.group_size", "8192 tokens"),
    ({"train.steps": 0}, "train.steps", "at least 1"),
    ({"train.accumulate_steps": 5}, "train.accumulate_steps", "batch_size=32"),
    ({"train.batch_size": 12}, "train.batch_size", "data=8"),
    ({"optimizer.learning_rate": -1.0}, "optimizer.learning_rate", "positive"),
    ({"mesh.data": 16}, "mesh", "data=8"),
    ({"mesh.data": 1, "mesh.expert": 8, "model.moe.num_experts": 12}, "mesh.expert", "num_experts=12"),
    ({"mesh.data": 1, "mesh.tensor": 8}, "mesh.tensor", "num_heads=4"),
    ({"mesh.expert": 2, "model.moe.num_experts": 0}, "mesh.expert", "dense"),
]


@pytest.mark.parametrize("changes, field, words", WRONG,
                         ids=[" ".join(f"{k}={v}" for k, v in wrong[0].items()) for wrong in WRONG])
def test_mistakes_are_refused_by_name(changes, field, words):
  # Catches: each check removed; a remedy that does not say what would be right.
  with pytest.raises(ConfigError) as error:
    build.validate(config(changes), 8)
  assert error.value.field == field and words in str(error.value)
  assert "\n" not in str(error.value) and repr(error.value.value) in str(error.value)


def test_dense_models_need_no_experts_to_be_right():
  # Catches: keys of experts that a dense model trips over.
  build.validate(config({"model.moe.num_experts": 0, "model.moe.first": 99, f"{R}.top_k.k": 99}), 8)


def test_noncausal_routing_on_demand():
  # Catches: a refusal that cannot be overruled.
  build.validate(config({f"{R}.name": "expert_choice", "model.moe.allow_noncausal_routing": True}))


def test_bind():
  # Catches: options of one name bound to another; an int refused for a float.
  table = {"a": lambda x, *, s=1.0, n=2: (x, s, n), "b": lambda x: x}
  assert build.bind(table, {"name": "a", "a": {"s": 3}, "b": {}}, "f")(0) == (0, 3, 2)
  assert build.bind(table, {"name": "b", "a": {"s": 3.0}}, "f")(5) == 5
  for options, field in (({"name": "a", "a": {"n": True}}, "f.a.n"), ({"name": "a", "b": {"n": 1}}, "f.b.n"),
                         ({"name": "a", "c": {}}, "f")):
    with pytest.raises(ConfigError) as error:
      build.bind(table, options, "f")
    assert error.value.field == field


def test_loss_weights_name_what_the_model_reports():
  # Catches: a loss that is computed and not weighted, or weighted and not computed (a KeyError in the first step).
  c = config({"model.moe.z_loss": 0.0, "model.moe.load_loss": 0.5})
  assert build.loss_weights(c) == {"balance": 0.01, "load": 0.5}
  model = build.model(c, 264, sharding.make_mesh({"data": 1}))
  ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  run = lambda key, ids: model.init_with_output(key, ids, ids, ids, train=False)[0][1].losses
  assert set(jax.eval_shape(run, jax.random.key(0), ids)) == {"balance", "load"}
  assert build.loss_weights(config({"model.moe.num_experts": 0})) == {}


def test_expert_choice_sizes_its_own_slots():
  # Catches: the layer's capacity dropping what the router chose; dropless buffers of S slots.
  c = config({f"{R}.name": "expert_choice", f"{R}.expert_choice.capacity_factor": 3, "model.moe.capacity_factor": 0.1})
  layer = build.model(c, 264, sharding.make_mesh({"data": 1})).moe.keywords
  assert layer["capacity_factor"] == 3.0 and layer["capacity_basis"] == "tokens"


def test_vocabulary():
  # Catches: an embedding smaller than the tokenizer.
  mesh = sharding.make_mesh({"data": 1})
  assert build.model(config(), 264, mesh).vocab_size == 264
  assert build.model(config({"model.vocab_size": 512}), 264, mesh).vocab_size == 512
  with pytest.raises(ConfigError, match="model.vocab_size=100"):
    build.model(config({"model.vocab_size": 100}), 264, mesh)


def test_parameters_and_flops_by_hand():
  # D=8, 2 heads of 4, F=16 gated, V=10, 2 layers of which the second has 4 experts of F=6, top-2, one shared expert.
  # attention 4*8*8 = 256 and 2 norms of 8 a layer: 2 * 272 = 544; dense FFN 3*8*16 = 384; expert 3*8*6 = 144;
  # router 32; shared 144; final norm 8; embedding 80.
  # Total 544 + 384 + 4*144 + 32 + 144 + 8 + 80 = 1768; activated 1768 - 2*144 = 1480.
  # Weights in matmuls: 1480 less 5 norms of 8 = 1440; attention of L=16: 4 * 2 layers * 16 * 8 = 1024.
  # Catches: norms counted as matmuls, shared experts as routed ones, an embedding counted twice.
  sizes = {"model.d_model": 8, "model.num_layers": 2, "model.num_heads": 2, "model.num_kv_heads": 2,
           "model.head_dim": 4, "model.d_ff": 16, "model.moe.num_experts": 4, "model.moe.d_ff": 6,
           "model.moe.num_shared_experts": 1, "data.seq_len": 16}
  assert build.parameter_counts(config(sizes), 10) == (1768, 1480)
  assert build.flops_per_token(config(sizes), 10) == 2 * 1440 + 1024
  untied = config(sizes | {"model.tied_embeddings": False})
  assert build.parameter_counts(untied, 10) == (1848, 1560)
  assert build.flops_per_token(untied, 10) == 2 * 1440 + 1024
  ec = config(sizes | {f"{R}.name": "expert_choice", f"{R}.expert_choice.capacity_factor": 1.0})
  assert build.parameter_counts(ec, 10) == (1768, 1480 - 144)


def test_a_scanned_model_has_the_same_counts():
  # Catches: leading layer axes that hide an expert's weights.
  counts = [build.parameter_counts(config({"model.scan_layers": scan}), 264) for scan in (True, False)]
  assert counts[0] == counts[1]


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_every_choice_builds_and_traces(router, dispatcher):
  # Catches: a router or dispatcher that the tables list and the model cannot hold.
  c = config({f"{R}.name": router, f"{W}.name": dispatcher, "model.moe.allow_noncausal_routing": True,
              "model.num_layers": 1, "model.moe.first": 0})
  build.validate(c)
  model = build.model(c, 264, sharding.make_mesh({"data": 1}))
  ids = jax.ShapeDtypeStruct((2, 16), jnp.int32)
  shapes = jax.eval_shape(lambda key, ids: model.init_with_output(key, ids, ids, ids, train=False)[0],
                          jax.random.key(0), ids)
  assert shapes[0].shape == (2, 16, 264) and shapes[1].metrics["load"].shape == (1, 8)
