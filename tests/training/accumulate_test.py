"""An update does not depend on the number of microbatches or on the mesh.

Losses, metrics, gradients and router bias agree to 1e-6, with every preset's routing noise on. This
holds for all presets, also for those with a capacity. The reason is that a routing group is a row
here, so that the same tokens compete for slots, and the same are dropped, in all microbatches.
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
from moe_jax.hlo.flops import matmul_flops
from moe_jax.routing.balancing import RULES
from moe_jax.training import evaluate
from moe_jax.training import state as states
from moe_jax.training.accumulate import accumulate
from moe_jax.training.step import train_step

pytestmark = pytest.mark.numerics

E, ROWS, LENGTH, SOURCE, V = 16, 32, 16, 24, 264
# A model with one layer of experts between the embedding and the softmax compiles fastest. Other
# families have tests of their own.
CHANGES = {
  "model.family": "brainformer",
  "model.block": ("moe",),
  "model.num_layers": 1,
  "model.scan_layers": False,
  "model.d_model": 16,
  "model.num_heads": 2,
  "model.num_kv_heads": 2,
  "model.head_dim": 8,
  "model.d_ff": 16,
  "model.moe.num_experts": E,
  "model.moe.d_ff": 8,
  "model.moe.dispatcher.name": "einsum",
  "model.moe.allow_noncausal_routing": True,
  "data.seq_len": LENGTH,
  "train.batch_size": ROWS,
  "mesh.data": 1,
}
# E experts can form four groups, but not the paper's 16 groups of at least two experts.
FEWER = {"hierarchical": {"model.moe.router.hierarchical.groups": 4}}
NOT_CAUSAL = {
  "model.family": "decoder",
  "model.block": (),
  "model.moe.first": 0,
  "model.moe.every": 1,
}
OTHERS = {
  "decoder": (
    "mixtral",
    NOT_CAUSAL | {"model.num_layers": 2, "model.scan_layers": True, "model.remat": "full"},
  ),
  "encoder_decoder": (
    "deepseek_v2",
    NOT_CAUSAL
    | {
      "model.family": "encoder_decoder",
      "model.position": "relative",
      "data.objective": "span_corruption",
      "data.encoder_len": SOURCE,
      "model.moe.balance_over": "global",
      "model.moe.jitter": 0.1,
      "model.moe.layer_reduce": "sum",
    },
  ),
  "lstm": ("noisy_top_k", NOT_CAUSAL | {"model.family": "lstm"}),
  "two groups a row": (
    "random",
    {
      "model.moe.group_size": LENGTH // 2,
      "model.moe.jitter": 0.1,
      "model.moe.z_loss": 0.1,
      "model.moe.jitter_on": "logits",
    },
  ),
  "device loss": ("deepseek_moe_145b", {"model.moe.balance_over": "global"}),
  "quantile": (
    "deepseek_v3",
    {"model.moe.balancing.rule": "quantile_histogram", "model.moe.balancing.rate": 1.0},
  ),
}
FSDP, EXPERT = "data=2 fsdp=2", "data=2 expert=2"


def config_of(preset, changes=()):
  config = changed({key: value for key, value in CHANGES.items() if key != "model.moe.num_experts"})
  assembly.use_preset(config, preset)
  own = FEWER.get(preset, {}) | dict(changes)
  with config.unlocked(), config.ignore_type():
    config.update_from_flattened_dict({"model.moe.num_experts": E, "model.moe.d_ff": 8} | own)
  return config


@functools.cache
def batch_of(encodes):
  """Returns rows of different lengths, whose tokens all differ so that no two have equal scores."""
  rng = np.random.default_rng(0)

  def rows(prefix, length):
    real = np.arange(length) < rng.integers(length // 4, length + 1, (ROWS, 1))
    return {
      f"{prefix}segment_ids": real.astype(np.int32),
      f"{prefix}positions": np.tile(np.arange(length, dtype=np.int32), (ROWS, 1)),
    }

  def different(length):
    return np.stack([rng.permutation(V - 8)[:length] for _ in range(ROWS)]).astype(np.int32)

  tokens = different(LENGTH + 1)
  batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]} | rows("", LENGTH)
  return batch | (
    {"encoder_tokens": different(SOURCE)} | rows("encoder_", SOURCE) if encodes else {}
  )


def keep_gradients():
  """Returns an optimizer that does gradient descent and keeps the gradient as its state."""
  return optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, before, params=None: (jax.tree.map(lambda g: -0.1 * g, grads), grads),
  )


def draw(abstract):
  """Returns a state of these shapes with random weights, even where a router begins at zero."""
  rng = np.random.default_rng(0)

  def one(leaf):
    return np.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype)

  def zeros(tree):
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)

  return abstract.replace(
    step=np.int32(0),
    params=jax.tree.map(one, abstract.params),
    rng=jax.random.key(0),
    opt_state=zeros(abstract.opt_state),
    router_state=zeros(abstract.router_state),
  )


def setup(preset, changes=(), steps=1, mesh="data=1"):
  """Returns `(step, state, batch, mesh)`, an update that is not compiled yet and its arguments."""
  sizes = {f"mesh.{axis}": int(n) for axis, n in (part.split("=") for part in mesh.split())}
  config = config_of(preset, dict(changes) | sizes | {"train.accumulate_steps": steps})
  devices = sharding.make_mesh(dict(config.mesh))
  assembly.validate(config, devices.size)
  model = assembly.model(config, V, devices)
  abstract, _ = states.create(devices, model, keep_gradients(), 0, LENGTH, ROWS)
  state = draw(abstract)
  if devices.size > 1:
    state = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), state, abstract)
  step = functools.partial(
    train_step,
    model=model,
    optimizer=keep_gradients(),
    schedule=lambda step: 0.0,
    accumulate_steps=steps,
    loss_weights=assembly.loss_weights(config),
    balance=assembly.balance(config),
  )
  return step, state, batch_of(config.data.objective == "span_corruption"), devices


def update(preset, changes=(), steps=1, mesh="data=1"):
  """Returns {"gradients", "params", "router_state", "metrics"} of one update."""
  step, state, batch, devices = setup(preset, changes, steps, mesh)
  with jax.set_mesh(devices):
    after, metrics = tiny.quick_jit(step)(state, evaluate.put(devices, batch))
  found = {
    "gradients": after.opt_state,
    "params": after.params,
    "router_state": after.router_state,
    "metrics": metrics,
  }
  return jax.tree.map(np.asarray, found)


@functools.lru_cache(maxsize=1)
def whole(preset, changes=()):
  return update(preset, dict(changes))


def assert_same(found, expected):
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), found, expected)
  jax.tree.map(np.testing.assert_array_equal, found["router_state"], expected["router_state"])


# One preset of each kind: with noise in two levels and losses of importance and load, with learned
# thresholds, with slots in place of assignments, and with a bias that moves. `OTHERS` and `MESHED`
# add jitter, losses by device and random experts.
KINDS = {"hierarchical", "strictly_balanced", "soft_moe", "deepseek_v3"}
# The presets whose rule of balancing sorts the whole batch at once are refused with microbatches.
CUTTABLE = [
  name
  for name, (_, _, keys) in assembly.PRESETS.items()
  if RULES[keys.get("balancing.rule", "sign")].adds_up
]
CUTS = tiny.often(
  {(preset, 4) for preset in KINDS}, [(preset, steps) for preset in CUTTABLE for steps in (4, 2, 8)]
)
MESHED = tiny.often(
  {("mixtral", 4, FSDP), ("deepseek_v3", 4, EXPERT)},
  [
    (preset, steps, mesh)
    for preset in assembly.PRESETS
    for mesh in (FSDP, EXPERT)
    for steps in (1, 2, 4, 8)
    if steps == 1 or preset in CUTTABLE
  ],
)


@pytest.mark.parametrize(("preset", "steps"), CUTS)
def test_microbatches_make_the_update_of_the_whole_batch(preset, steps):
  # Catches a loss over the batch that uses f and P of a microbatch; auxiliary losses or metrics
  # that are summed over microbatches, or averaged without regard to padding; routing noise that is
  # the same in all microbatches, or depends on them; a group that draws the noise of another one;
  # and a bias that is moved by rounded shares.
  assert_same(update(preset, steps=steps), whole(preset))


@pytest.mark.parametrize(("preset", "steps", "mesh"), MESHED)
def test_microbatches_on_a_mesh(preset, steps, mesh):
  # Catches rows that go to another microbatch on a mesh, and numbers of real tokens, f or counts
  # that only cover the rows of one device.
  assert_same(update(preset, steps=steps, mesh=mesh), whole(preset))


@pytest.mark.parametrize(
  ("preset", "changes"),
  [
    pytest.param(
      *other,
      marks=pytest.mark.every_variant
      if name in ("lstm", "device loss", "decoder", "encoder_decoder")
      else (),
      id=name,
    )
    for name, other in OTHERS.items()
  ],
)
def test_other_models_and_groups(preset, changes):
  # Catches a family that does not pass the microbatch to its layers; f of one layer that is used in
  # another, under a scan or from the encoder to the decoder; the decoder's number of tokens in the
  # encoder; noise that is drawn by group although a row has two groups; a forgotten f of the
  # devices; and a histogram of the last microbatch only.
  assert_same(update(preset, changes, steps=4), whole(preset, tuple(changes.items())))


def keys_of(steps):
  """Returns the keys {"dropout", "router"} of each microbatch, [steps, 2]."""

  def grad_of(params, rows, rngs, micro):
    index = 0 if micro is None else micro.index
    keys = {
      name: jnp.zeros_like(params[name]).at[index].set(jax.random.key_data(key))
      for name, key in rngs.items()
    }
    return keys, ({}, {})

  nothing = {name: jnp.zeros((steps, 2), jnp.uint32) for name in ("dropout", "router")}
  batch = {"segment_ids": jnp.ones((steps, 1), jnp.int32)}
  return jax.tree.map(
    np.asarray, accumulate(grad_of, lambda *part: {}, nothing, batch, jax.random.key(0), steps)[0]
  )


def test_keys_of_microbatches():
  # Catches microbatches that all have the same dropout, and a key of routing noise that depends on
  # the microbatch or on the number of microbatches.
  one, four = keys_of(1), keys_of(4)
  assert len({tuple(key) for key in four["dropout"]}) == 4 and not np.array_equal(
    one["dropout"][0], one["router"][0]
  )
  np.testing.assert_array_equal(four["router"], np.tile(one["router"], (4, 1)))


def test_each_row_is_in_one_microbatch():
  # Row r of 6 must be in microbatch r mod 3. Catches microbatches of consecutive rows, which would
  # have to move between devices.
  def grad_of(rows_of, rows, rngs, micro):
    return rows_of.at[rows["row"]].set(micro.index), ({}, {"logit_max": micro.tokens})

  batch = {"row": jnp.arange(6), "segment_ids": jnp.ones((6, 2), jnp.int32)}
  found, _, sums = accumulate(
    grad_of, lambda *part: {}, jnp.zeros(6, jnp.int32), batch, jax.random.key(0), 3
  )
  assert found.tolist() == [0, 1, 2, 0, 1, 2] and float(sums["logit_max"]) == 12.0


def flops(over, steps):
  step, state, batch, _ = setup("mixtral", {"model.moe.balance_over": over}, steps)
  return matmul_flops(step, state, batch)


def test_only_losses_over_the_batch_cost_another_forward_pass():
  # Catches a first pass although no loss needs f, and one that is differentiated or computes what f
  # does not depend on. That is the logits and the last layer's experts, which are nearly all of
  # this model's work.
  assert flops("group", 4) == flops("group", 1)
  once = flops("global", 1)
  assert once < flops("global", 4) < 1.02 * once


def test_seeds_can_be_mapped():
  # Catches a first pass that needs the concrete value of an array, which vmap does not have.
  step, state, batch, _ = setup("mixtral", steps=2)
  many = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)
  _, metrics = jax.eval_shape(jax.vmap(step, in_axes=(0, None)), many, batch)
  assert metrics["balance"].shape == (2,) and metrics["moe/load"].shape == (2, 1, E)
