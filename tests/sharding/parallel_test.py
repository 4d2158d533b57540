"""Tests that three training steps on any mesh equal those on one device.

Gradients, weights, metrics and the router's state are compared on every copy. What each dispatcher
computes and sends on more meshes is tested in dispatch/expert_mesh_test. Everything in a
`jax.shard_map` runs with check_vma=True, as `expert_mesh.over_mesh` explains.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from changed import config as changed

from moe_jax import assembly, sharding
from moe_jax.dispatch import DISPATCHERS
from moe_jax.training import evaluate, optimizers
from moe_jax.training import state as states
from moe_jax.training.step import train_step

pytestmark = pytest.mark.numerics

ROWS, LENGTH, ENCODER_LENGTH, V = 8, 16, 24, 264
ONE = "data=1"
MESHES = (
  "data=8",
  "fsdp=8",
  "expert=8",
  "data=2 fsdp=4",
  "data=2 expert=4",
  "fsdp=4 tensor=2",
  "expert=4 tensor=2",
  "fsdp=2 expert=4",
  "fsdp=2 expert=2 tensor=2",
  "data=2 expert=2 tensor=2",
  "data=2 fsdp=2 expert=2",
)
# These pairs run by default. What the other dispatchers compute and send on such meshes is tested
# in dispatch/expert_mesh_test.
SOME = {("ragged_all_to_all", "data=2 expert=4"), ("einsum", "fsdp=2 expert=2 tensor=2")}
RUNS = [
  pytest.param(name, mesh, marks=() if (name, mesh) in SOME else pytest.mark.every_variant)
  for mesh in MESHES
  for name in DISPATCHERS
]
# These dispatchers use jax.lax.ragged_dot on TPUs, which compiles faster than their loops for CPUs.
PLATFORM = {"grouped": "tpu", "all_gather": "tpu"}
# The model has all that could differ between devices: a router whose state changes, experts that
# overflow, noise, and biases.
CHANGES = {
  "model.d_model": 16,
  "model.num_layers": 1,
  "model.scan_layers": False,
  "model.num_heads": 2,
  "model.num_kv_heads": 2,
  "model.head_dim": 8,
  "model.ffn_bias": "additive",
  "model.moe.expert_bias": True,
  "model.moe.first": 0,
  "model.d_ff": 32,
  "model.moe.d_ff": 8,
  "model.moe.num_experts": 8,
  "model.moe.router.name": "sigmoid_bias",
  "model.moe.router.sigmoid_bias.k": 2,
  "model.moe.balancing.rule": "sign",
  "model.moe.balancing.rate": 0.125,
  "model.moe.capacity_factor": 1.0,
  "model.moe.capacity_basis": "assignments",
  "model.moe.jitter": 0.1,
  "model.moe.balance_over": "global",
  "data.seq_len": LENGTH,
  "train.batch_size": ROWS,
  "optimizer.warmup_steps": 0,
  # Adam divides by the root of squares. With its usual eps, gradients of 1e-9 would decide the sign
  # of an update.
  "optimizer.eps": 1e-3,
  "optimizer.learning_rate": 0.05,
}
FAMILIES = {
  "one layer": {},
  "scanned and rematerialised": {
    "model.num_layers": 2,
    "model.moe.every": 1,
    "model.scan_layers": True,
    "model.remat": "full",
    "model.moe.balancing.rule": "quantile_histogram",
    "model.moe.balancing.rate": 1.0,
  },
  "encoder_decoder": {
    "model.family": "encoder_decoder",
    "model.position": "relative",
    "data.objective": "span_corruption",
    "data.encoder_len": ENCODER_LENGTH,
  },
  # Adafactor factors the moments of matrices whose sides are both at least 128. Here these are the
  # embedding's and the experts'.
  "adafactor": {"optimizer.name": "adafactor", "model.d_model": 128, "model.moe.d_ff": 128},
  # Muon, whose matrices are those of each of two scanned layers and of each expert.
  "muon": {
    "optimizer.name": "muon",
    "model.num_layers": 2,
    "model.moe.every": 1,
    "model.scan_layers": True,
  },
  # Four blocks of queries, and three chunks of the vocabulary.
  "in blocks and chunks": {"model.attention_block": 4, "model.logits_chunk": 88},
  "lstm": {"model.family": "lstm", "model.lstm_units": 24, "model.num_layers": 1},
  "latent": {
    "model.attention": "latent",
    "model.latent.kv_rank": 8,
    "model.latent.query_rank": 8,
    "model.latent.nope_dim": 8,
    "model.latent.rope_dim": 4,
    "model.latent.value_dim": 8,
  },
  "experts of 2025": {
    "model.num_layers": 2,
    "model.moe.every": 1,
    "model.moe.latent_width": 8,
    "model.moe.gate_residual": True,
    "model.moe.simbal_loss": 0.01,
    "model.activation": "clamped_swiglu",
    "model.qk_norm": True,
    "model.qk_norm_over": "head",
    "model.sinks": True,
    "model.sliding_window": 4,
    "model.global_every": 2,
  },
  "exact quantile": {"model.moe.balancing.rule": "quantile", "model.moe.balancing.rate": 1.0},
  "without an FFN": {
    "model.moe.zero_experts": 1,
    "model.moe.copy_experts": 1,
    "model.moe.constant_experts": 2,
    "model.moe.zero_tau": 0.75,
  },
  "other rules": {
    "sharding.vocab": ("tensor", "fsdp"),
    "sharding.embed": (),
    "sharding.mlp": (),
    "sharding.act_embed": ("tensor",),
  },
}

# Other routers, on the model of "one layer". Only sigmoid_bias has a bias, and some of the others
# have losses and noise of their own.
R = "model.moe.router"
ROUTERS = {
  "expert_choice": {
    f"{R}.expert_choice.capacity_factor": 2.0,
    "model.moe.allow_noncausal_routing": True,
  },
  "st_moe": {f"{R}.st_moe.k": 2, f"{R}.st_moe.threshold": 0.4},
  "hash_layer": {},
  "noisy_top_k": {
    f"{R}.noisy_top_k.k": 2,
    "model.moe.importance_loss": 0.1,
    "model.moe.importance_of": "gates",
    "model.moe.load_loss": 0.1,
    "model.moe.balance_loss": 0.0,
  },
  "gshard": {},
  # With what else published routers learn, and with a copy of its token for each assignment.
  "scored_top_k": {
    f"{R}.scored_top_k.score": "sqrt_softplus",
    "model.moe.router_norm": "rms",
    "model.moe.router_bias": True,
    "model.moe.logit_softcap": 5.0,
    "model.moe.expert_scale": True,
    "model.moe.gate_on": "input",
  },
}
FAMILIES |= {
  name: {f"{R}.name": name, "model.moe.balancing.rule": "none"} | own
  for name, own in ROUTERS.items()
}


@functools.cache
def batches():
  """Returns three batches of skewed tokens and padded rows, with the inputs of an encoder."""
  rng, made = np.random.default_rng(0), []

  def rows(prefix, length):
    real = np.arange(length) < rng.integers(length // 2, length + 1, (ROWS, 1))
    return {
      f"{prefix}segment_ids": real.astype(np.int32),
      f"{prefix}positions": np.tile(np.arange(length, dtype=np.int32), (ROWS, 1)),
    }

  for _ in range(3):
    tokens = rng.zipf(1.3, (ROWS, LENGTH + 1)).clip(max=V - 8).astype(np.int32)
    source = rng.zipf(1.3, (ROWS, ENCODER_LENGTH)).clip(max=V - 8).astype(np.int32)
    made.append(
      {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "encoder_tokens": source}
      | rows("", LENGTH)
      | rows("encoder_", ENCODER_LENGTH)
    )
  return made


def batch_of(config, batch):
  """Returns the part of a batch that the model of a config reads."""
  encodes = config.data.objective == "span_corruption"
  return {
    name: value for name, value in batch.items() if encodes or not name.startswith("encoder_")
  }


def setup(dispatcher, mesh, family):
  """Returns the config, mesh, model, optimizer and schedule of a run."""
  sizes = {
    f"mesh.{axis}": int(n) for axis, n in (part.split("=") for part in f"data=1 {mesh}".split())
  }
  config = changed(CHANGES | FAMILIES[family] | {"model.moe.dispatcher.name": dispatcher} | sizes)
  assembly.validate(config, 8)
  model = assembly.FAMILIES[config.model.family](config.model, V, PLATFORM.get(dispatcher, "cpu"))
  optimizer, schedule = optimizers.make(optimizers.OptimizerOptions.of(config.optimizer), 6)
  return (
    config,
    sharding.make_mesh(dict(config.mesh)),
    model,
    optax.chain(remember_gradients(), optimizer),
    schedule,
  )


def remember_gradients():
  """Returns a transformation whose state is the last gradients, as they come from the model."""
  return optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, before, params=None: (grads, grads),
  )


@functools.cache
def first_state(mesh, family):
  """Returns the initial state on a mesh; it is always drawn on one device and then moved."""
  config, devices, model, optimizer, _ = setup("einsum", mesh, family)
  with sharding.use_rules(dict(config.sharding)):
    abstract, draw = states.create(devices, model, optimizer, 0, LENGTH, ROWS)
  return (
    draw()
    if mesh == ONE
    else jax.tree.map(
      lambda leaf, like: jax.device_put(leaf, like.sharding), first_state(ONE, family), abstract
    )
  )


@functools.cache
def three_steps(dispatcher, mesh, family="one layer"):
  """Returns the state after a run and the metrics of each step, still on their devices."""
  config, devices, model, optimizer, schedule = setup(dispatcher, mesh, family)
  step = functools.partial(
    train_step,
    model=model,
    optimizer=optimizer,
    schedule=schedule,
    loss_weights=assembly.loss_weights(config),
    balance=assembly.balance(config),
  )
  state, metrics = first_state(mesh, family), []
  places = jax.tree.map(lambda leaf: leaf.sharding, state)
  step = tiny.quick_jit(step, out_shardings=(places, sharding.replicated(devices)))
  with jax.set_mesh(devices), sharding.use_rules(dict(config.sharding)):
    for batch in batches():
      state, seen = step(state, evaluate.put(devices, batch_of(config, batch)))
      metrics.append(seen)
  return state, metrics


def assert_as_on_one_device(state, metrics, family):
  expected, wanted = three_steps("einsum", ONE, family)

  def close(a, b):
    return np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-5)

  jax.tree.map(close, metrics, wanted)

  # The gradients are opt_state[0].
  def trained(s):
    return (s.params, s.opt_state, s.router_state)

  jax.tree.map(close, trained(state), trained(expected))
  # These are counts, and they agree exactly if the routing decisions are the same.
  for name in ("moe/load", "moe/drop_rate", "moe/dropped_tokens"):
    np.testing.assert_array_equal(metrics[-1][name], wanted[-1][name])
  jax.tree.map(assert_copies_agree, (trained(state), metrics))


@pytest.mark.parametrize("dispatcher, mesh", RUNS)
def test_any_mesh_trains_the_same(dispatcher, mesh):
  # Catches a gradient that is summed over copies or is not summed over devices, a loss or load of
  # one device only, noise that depends on the mesh, tokens that are dropped in the order of
  # devices, and a router's bias that changes differently on different devices.
  assert_as_on_one_device(*three_steps(dispatcher, mesh), "one layer")


WHOLE = "fsdp=2 expert=2 tensor=2"
OTHERS = [
  ("scanned and rematerialised", "grouped", "data=2 expert=4"),
  ("encoder_decoder", "all_to_all", WHOLE),
  ("other rules", "all_to_all", WHOLE),
  ("other rules", "grouped", WHOLE),
  ("adafactor", "all_to_all", WHOLE),
  ("muon", "all_to_all", WHOLE),
  ("in blocks and chunks", "einsum", WHOLE),
  ("lstm", "einsum", WHOLE),
  ("latent", "all_to_all", WHOLE),
  ("exact quantile", "grouped", WHOLE),
  ("experts of 2025", "all_to_all", WHOLE),
  ("experts of 2025", "ragged_all_to_all", "data=2 expert=4"),
  ("without an FFN", "ragged_all_to_all", WHOLE),
  *((name, "all_to_all", WHOLE) for name in ROUTERS),
]
OFTEN = {
  "scanned and rematerialised",
  "muon",
  "in blocks and chunks",
}  # `make test-all` runs the others


@pytest.mark.parametrize(
  "family, dispatcher, mesh", tiny.often({other for other in OTHERS if other[0] in OFTEN}, OTHERS)
)
def test_other_models_and_rules_train_the_same(family, dispatcher, mesh):
  # Catches a recomputed layer that draws other noise, stacked weights that are split along
  # "layers", an encoder's output or padding of one device only, a dispatcher that relies on rules
  # that the config has changed, factors or an RMS of one shard only in Adafactor, a matrix of one
  # shard only in Muon, a block of queries or a chunk of the vocabulary of one shard only, a
  # recurrent state or a latent of one shard only, a histogram or quantile of one device only,
  # noise, losses or a hash of other routers that depend on the mesh, and output of experts without
  # an FFN that is added once per device.
  assert_as_on_one_device(*three_steps(dispatcher, mesh, family), family)


@pytest.mark.parametrize("family", tiny.often({"one layer", *OFTEN}, FAMILIES))
def test_the_run_exercises_what_it_should(family):
  # Catches a comparison of runs in which no token is dropped, no bias changes, a weight has no
  # gradient, or nothing is learnt.
  state, metrics = three_steps("einsum", ONE, family)
  # Under expert choice no token is dropped.
  assert all((0 < m["moe/drop_rate"].min() < 1) == (family != "expert_choice") for m in metrics)
  assert np.any(state.router_state["bias"]) if family not in ROUTERS else not state.router_state
  assert metrics[-1]["loss"] < metrics[0]["loss"]
  # A matrix whose moments are not factored has a placeholder of one number.
  factored = [
    slot.shape
    for path, slot in jax.tree_util.tree_leaves_with_path(state.opt_state)
    if "v_row" in optimizers.keys(path) and slot.size > 8
  ]
  assert bool(factored) == (family == "adafactor")
  # The first layer with experts has no logits before it, so that its matrix has no effect.
  for path, gradient in jax.tree_util.tree_leaves_with_path(state.opt_state[0]):
    without_effect = optimizers.keys(path)[-3:] == ("layer_0", "ffn", "router_residual")
    assert (np.abs(gradient).max() > 1e-3) != without_effect, optimizers.keys(path)


def assert_copies_agree(leaf):
  """Asserts that the shards which are copies, by the sharding of `leaf`, are equal bit by bit."""
  first = {}
  for shard in leaf.addressable_shards:
    data = np.asarray(shard.data)
    np.testing.assert_array_equal(data, first.setdefault(str(shard.index), data))
