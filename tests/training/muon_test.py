"""Muon's updates equal a reference in NumPy for the matrix of each layer and expert alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from changed import config
from flax import linen as nn

from moe_jax import assembly, sharding
from moe_jax.training import muon, optimizers
from moe_jax.training import state as states
from moe_jax.training.step import train_step
from moe_jax.training.weight_paths import keys

pytestmark = pytest.mark.unit

RATE, RMS, DECAY, MOMENTUM, STEPS = 0.5, 0.2, 0.1, 0.9, 5


def make(**changes):
  settings = dict(
    name="muon",
    schedule="constant",
    warmup_steps=0,
    learning_rate=RATE,
    clip_norm=0.0,
    update_rms=RMS,
    weight_decay=DECAY,
    momentum=MOMENTUM,
    newton_schulz_steps=STEPS,
  )
  return optimizers.make(optimizers.OptimizerOptions(**settings | changes), 10)[0]


def reference(weight, gradients):
  """Returns the weight of one matrix after some steps of Muon, in NumPy and float64."""
  moment, rows, columns = 0.0, *weight.shape
  for t, gradient in enumerate(gradients, 1):
    moment = MOMENTUM * moment + (1 - MOMENTUM) * gradient
    # Nesterov's momentum with Adam's correction of the bias towards 0.
    ahead = MOMENTUM * moment / (1 - MOMENTUM ** (t + 1))
    x = ahead + (1 - MOMENTUM) * gradient / (1 - MOMENTUM**t)
    x = x / np.linalg.norm(x)
    for _ in range(STEPS):
      square = x @ x.T
      x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    weight = weight - RATE * (RMS * np.sqrt(max(rows, columns)) * x + DECAY * weight)
  return weight


# The shapes of weights of a scanned layer, and the matrix of each as (inputs, outputs).
SHAPES = {
  ("ffn", "up"): ((2, 3, 4, 6), (4, 6)),
  ("ffn", "down"): ((2, 3, 6, 4), (6, 4)),
  ("attention", "query"): ((2, 4, 2, 3), (4, 6)),
  ("attention", "output"): ((2, 2, 3, 4), (6, 4)),
}


def test_each_matrix_is_updated_alone():
  # Catches a matrix of several experts or layers, heads that are matrices of their own, an update
  # whose size depends on another side or on the gradient, weight decay that is not scaled by the
  # rate, and momentum without Nesterov's look ahead.
  rng = np.random.default_rng(0)

  def draw():
    values = {path: rng.normal(size=shape) for path, (shape, _) in SHAPES.items()}
    # Experts whose gradients are of other sizes.
    values["ffn", "up"] *= np.exp(rng.normal(size=(2, 3, 1, 1)))
    return values

  def tree(values):
    layer = {"ffn": {}, "attention": {}}
    for (part, name), value in values.items():
      layer[part][name] = jnp.asarray(value, jnp.float32)
    return {"repeats": {"layer_0": layer}}

  weights, gradients = draw(), [draw(), draw()]
  optimizer, params = make(), tree(weights)
  state = optimizer.init(params)
  for gradient in gradients:
    updates, state = optimizer.update(tree(gradient), state, params)
    params = jax.tree.map(jnp.add, params, updates)
  for (part, name), (shape, matrix) in SHAPES.items():
    counted = (2, 3) if part == "ffn" else (2,)
    for at in np.ndindex(counted):
      alone = [values[part, name][at].reshape(matrix) for values in (weights, *gradients)]
      wanted = reference(alone[0], alone[1:]).reshape(shape[len(counted) :])
      found = params["repeats"]["layer_0"][part][name][at]
      np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_an_update_is_nearly_orthogonal():
  # The singular values of the gradient are 1 to 100, and those of the update 0.2 sqrt(8) times a
  # number near 1. Catches an iteration that is not run, or that has diverged.
  rng = np.random.default_rng(0)
  left, right = (np.linalg.qr(rng.normal(size=(8, 8)))[0] for _ in range(2))
  gradient = {"up": jnp.asarray(left @ np.diag(np.geomspace(1, 100, 8)) @ right, jnp.float32)}
  params = jax.tree.map(jnp.zeros_like, gradient)
  optimizer = make(learning_rate=1.0)
  (update,) = optimizer.update(gradient, optimizer.init(params), params)[0].values()
  values = np.linalg.svd(update, compute_uv=False) / (RMS * np.sqrt(8))
  assert np.all((0.6 < values) & (values < 1.3))


@pytest.mark.parametrize(
  "changes",
  [
    {"model.num_layers": 6},
    {"model.attention": "latent", "model.latent.query_rank": 8},
    {"model.family": "encoder_decoder", "model.position": "relative", "model.qk_norm": True},
    {
      "model.qkv_bias": True,
      "model.tied_embeddings": False,
      "model.ffn_bias": "additive",
      "model.moe.num_shared_experts": 1,
      "model.moe.shared_gate": True,
      "model.moe.router_bias": True,
    },
    {"model.family": "lstm", "model.lstm_units": 24},
    {"model.moe.router.name": "hierarchical", "model.moe.soft_slots": 1},
  ],
  ids=str,
)
def test_matrices_are_those_of_attention_and_ffns(changes):
  # Catches embeddings, routers, norms or biases that get Muon, and a matrix under another name that
  # does not get it.
  variables = assembly.abstract_variables(config(changes), 264)["params"]

  def is_box(leaf):
    return isinstance(leaf, nn.LogicallyPartitioned)

  for path, leaf in jax.tree_util.tree_leaves_with_path(variables, is_leaf=is_box):
    *_, name = names = keys(path)
    counted = sum(axis in ("layers", "expert") for axis in leaf.names)
    other = {"vocab", "router"} & set(leaf.names) or name in ("shared_gate", "mu")
    vector = leaf.value.ndim - counted < 2 or name.endswith(("bias", "scale"))
    wanted = None if other or vector else tuple(range(counted, leaf.value.ndim))
    axes = muon.matrix_axes(names, leaf.value.ndim)
    assert (axes and axes[0] + axes[1]) == wanted, names


def test_other_weights_have_adamw():
  # Catches a router or an embedding without an update, or with one of another size.
  params = {"embedding": jnp.ones((5, 4)), "router": jnp.ones((4, 3)), "up": jnp.ones((4, 4))}
  gradients = {name: jnp.full_like(leaf, 0.3) for name, leaf in params.items()}
  updates = [
    optimizer.update(gradients, optimizer.init(params), params)[0]
    for optimizer in (make(), make(name="adamw"))
  ]
  for name in params:
    assert np.allclose(updates[0][name], updates[1][name]) == (name != "up")


def test_its_state_lies_as_the_weights_do():
  # Catches moments that every device holds whole.
  c = config({"model.num_layers": 4, "optimizer.name": "muon"})
  mesh = sharding.make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})
  model = assembly.model(c, 264, mesh)
  optimizer, _ = optimizers.make(optimizers.OptimizerOptions.of(c.optimizer), 10)
  abstract, _ = states.create(mesh, model, optimizer, 0, 16, 8)
  weights = {
    keys(path): leaf.sharding.spec
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract.params)
  }
  moments = {
    keys(path)[keys(path).index("mu") + 1 :]: leaf.sharding.spec
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract.opt_state)
    if "mu" in keys(path)
  }
  assert moments == weights and any("expert" in spec for spec in moments.values())


def test_forty_steps_learn(tmp_path):
  # Catches updates of the wrong sign or size in a whole model.
  c = tiny.config(tmp_path, optimizer__name="muon", optimizer__learning_rate=0.02)
  mesh = sharding.make_mesh({"data": 1})
  model = assembly.model(c, 264, mesh)
  optimizer, schedule = optimizers.make(optimizers.OptimizerOptions.of(c.optimizer), 40)
  tokens = np.random.default_rng(0).zipf(1.5, (4, 33)).clip(max=255).astype(np.int32)
  batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
  batch["segment_ids"] = np.ones((4, 32), np.int32)
  batch["positions"] = np.tile(np.arange(32, dtype=np.int32), (4, 1))
  step = tiny.quick_jit(
    lambda state, batch: train_step(
      state,
      batch,
      model=model,
      optimizer=optimizer,
      schedule=schedule,
      loss_weights=assembly.loss_weights(c),
    )
  )
  with jax.set_mesh(mesh):
    state, losses = states.create(mesh, model, optimizer, 0, 32, 4)[1](), []
    for _ in range(40):
      state, metrics = step(state, batch)
      losses.append(float(metrics["cross_entropy"]))
  assert losses[0] > 5 and losses[-1] < 2.5
