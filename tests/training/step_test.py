"""The pure steps compute the right losses and metrics, and they can be mapped over seeds."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn

from moe_jax import assembly, sharding
from moe_jax.layers import Aux
from moe_jax.models.output import token_nats
from moe_jax.training import evaluate, optimizers
from moe_jax.training import state as states
from moe_jax.training import step as steps

pytestmark = pytest.mark.unit
LOSSES = {"balance": 0.01, "z": 0.001}


def batch_of(rows, length, padded=0, vocab=264, seed=0):
  tokens = np.random.default_rng(seed).integers(0, vocab - 8, (rows, length + 1)).astype(np.int32)
  segments = np.ones((rows, length), np.int32)
  segments[rows - 1, length - padded :] = 0
  return {
    "inputs": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "segment_ids": segments,
    "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
  }


def setup(tmp_path, edit=None, **changes):
  config = tiny.config(tmp_path, **changes)
  if edit:
    edit(config)
  mesh = sharding.make_mesh(dict(config.mesh))
  model = assembly.model(config, 264, mesh)
  optimizer, schedule = optimizers.make(
    optimizers.OptimizerOptions.of(config.optimizer), config.train.steps
  )
  step = functools.partial(
    steps.train_step,
    model=model,
    optimizer=optimizer,
    schedule=schedule,
    loss_weights=assembly.loss_weights(config),
  )
  with jax.set_mesh(mesh):
    return config, step, states.create(mesh, model, optimizer, 0, config.data.seq_len)[1]()


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
  """Returns `(step, state, weights)`, compiled once for the tests that need nothing special."""
  config, step, state = setup(tmp_path_factory.mktemp("usual"), optimizer__learning_rate=0.01)
  return (
    tiny.quick_jit(functools.partial(step, output_z_loss=0.5)),
    state,
    assembly.loss_weights(config),
  )


def test_loss_is_the_sum_of_its_parts(usual):
  # Catches a weight that is applied twice or not at all, and a missing output z-loss.
  step, state, weights = usual
  _, m = step(state, batch_of(4, 32))
  expected = (
    m["cross_entropy"] + 0.5 * m["output_z"] + sum(w * m[name] for name, w in weights.items())
  )
  assert set(weights) == {"balance", "z"}
  np.testing.assert_allclose(m["loss"], expected, rtol=1e-6)
  # Step 0 of a warm-up of 2 steps has half of the peak.
  assert float(m["learning_rate"]) == pytest.approx(5e-3)


def test_the_output_z_loss_is_the_mean_square_of_log_z(usual):
  # Catches a mean of another power of log Z, or over padding.
  step, state, _ = usual
  batch = batch_of(4, 32, padded=20)
  _, m = step(state, batch)
  inputs = (batch["inputs"], batch["segment_ids"], batch["positions"])
  model = step.__wrapped__.keywords["model"]
  logits, _ = tiny.quick_jit(functools.partial(model.apply, train=False))(
    {"params": state.params}, *inputs
  )
  log_z = np.log(np.exp(np.asarray(logits, np.float64)).sum(-1))[batch["segment_ids"] > 0]
  np.testing.assert_allclose(m["output_z"], np.mean(log_z**2), rtol=1e-4)


def test_padding_changes_nothing(usual):
  # Catches padding that takes slots of experts, is attended to, or counts in a loss or a gradient.
  step, state, _ = usual
  batch = batch_of(4, 32, padded=20)
  other = batch_of(4, 32, seed=1)
  real = batch["segment_ids"] > 0
  changed = batch | {
    name: np.where(real, batch[name], other[name]) for name in ("inputs", "targets")
  }
  (_, a), (_, b) = step(state, batch), step(state, changed)
  for name in ("loss", "cross_entropy", "output_z", "grad_norm"):
    np.testing.assert_allclose(a[name], b[name], rtol=1e-5)


def test_rows_of_padding_do_not_dilute_the_loss(usual):
  # The batch has two rows, followed by the same rows or by padding. Catches a mean over all tokens
  # that includes padding.
  step, state, _ = usual
  batch = batch_of(4, 32)
  twice = {name: np.concatenate([values[:2], values[:2]]) for name, values in batch.items()}
  padded = twice | {"segment_ids": twice["segment_ids"] * (np.arange(4) < 2)[:, None]}
  (_, expected), (_, found) = step(state, twice), step(state, padded)
  np.testing.assert_allclose(found["cross_entropy"], expected["cross_entropy"], rtol=1e-5)


def test_a_few_steps_learn(usual):
  # Catches an update of the wrong sign.
  step, state, _ = usual
  batch, losses = batch_of(4, 32), []
  for _ in range(6):
    state, metrics = step(state, batch)
    losses.append(float(metrics["cross_entropy"]))
  assert losses[-1] < losses[0] - 0.2 and int(state.step) == 6


def test_randomness_comes_from_the_step(tmp_path):
  # Catches noise that is the same at every step, and noise that differs when a step is repeated.
  config, step, state = setup(tmp_path, model__dropout=0.5)
  step, batch = tiny.quick_jit(step), batch_of(4, 32)

  def loss(s):
    return float(step(s, batch)[1]["loss"])

  assert loss(state) == loss(state) != loss(state.replace(step=state.step + 1))


def test_seeds_can_be_mapped(usual):
  # Catches I/O in the step, a need for concrete values, and runs that influence each other.
  step, state, _ = usual
  many = jax.tree.map(lambda x: jnp.stack([x, x]), state)
  many = many.replace(
    params=many.params | {"embedding": many.params["embedding"].at[1].multiply(2.0)}
  )
  after, metrics = tiny.quick_jit(jax.vmap(step.__wrapped__, in_axes=(0, None)))(
    many, batch_of(4, 32)
  )
  alone, expected = step(state, batch_of(4, 32))
  np.testing.assert_allclose(metrics["loss"][0], expected["loss"], rtol=1e-5)
  assert metrics["loss"].shape == (2,) and metrics["loss"][0] != metrics["loss"][1]
  assert after.params["embedding"].shape == (2, *alone.params["embedding"].shape)


def test_the_balancing_bias_moves_against_the_load(tmp_path):
  # Catches a router state that is never updated or moves in the wrong direction.
  config, step, state = setup(
    tmp_path, model__moe__balancing__rule="sign", model__moe__balancing__rate=0.125
  )
  balanced = functools.partial(step, balance=assembly.balance(config))
  after, m = tiny.quick_jit(balanced)(state, batch_of(4, 32))
  bias = np.asarray(after.router_state["bias"])
  load = np.asarray(m["moe/load"])
  np.testing.assert_array_equal(bias, 0.125 * np.sign(load.mean(-1, keepdims=True) - load))


class Uniform(nn.Module):
  """A model in which each of V tokens is equally likely."""

  vocab_size: int

  @nn.compact
  def __call__(self, tokens, segment_ids, positions, *, train, targets):
    scale = self.param("scale", nn.initializers.zeros, ())
    return token_nats(scale + jnp.zeros((*tokens.shape, self.vocab_size)), targets), Aux()


def test_a_uniform_model_has_log2_v_bits_a_byte():
  # Each of 256 ids stands for one byte, which costs 8 bits. Catches bits in place of nats, padding
  # that is counted, the missing cost of a boundary, and tokens in place of bytes.
  model, batch = Uniform(256), batch_of(2, 8, padded=3, vocab=256)
  sums = steps.eval_step(
    {"scale": jnp.zeros(())},
    {},
    jax.tree.map(jnp.asarray, batch),
    jnp.ones(256, jnp.int32),
    model=model,
  )
  assert int(sums["tokens"]) == int(sums["bytes"]) == 2 * 8 - 3
  totals = {
    "a": {k: float(v) for k, v in sums.items()},
    "b": {"nats": 0.0, "tokens": 1, "bytes": 13},
  }
  result = evaluate.summary(totals)
  np.testing.assert_allclose(
    [result["bits_per_byte/a"], result["loss/a"], result["bits_per_byte"]],
    [8.0, math.log(256), 4.0],
    rtol=1e-6,
  )


def test_bytes_are_those_that_tokens_stand_for():
  # The only real target is token 2, which stands for 5 bytes. Catches byte lengths that are looked
  # up by input instead of target.
  batch = {
    "inputs": np.array([[1, 2]]),
    "targets": np.array([[2, 3]]),
    "segment_ids": np.array([[1, 0]]),
    "positions": np.array([[0, 1]]),
  }
  sums = steps.eval_step(
    {"scale": jnp.zeros(())},
    {},
    jax.tree.map(jnp.asarray, batch),
    jnp.array([0, 1, 5, 7]),
    model=Uniform(4),
  )
  assert int(sums["bytes"]) == 5
  np.testing.assert_allclose(sums["nats"], math.log(4), rtol=1e-6)


# One preset for each router, and those with special parts: a tanh gate, a shared gate, Soft MoE and
# experts without an FFN.
PRESETS = (
  "adaptive_mixtures",
  "llama_moe",
  "hierarchical",
  "strictly_balanced",
  "mesh_tf_top_2",
  "qwen1_5_moe",
  "switch_no_token_left_behind",
  "expert_choice",
  "expert_choice_cap_2",
  "st_moe",
  "base_layers",
  "s_base",
  "hash",
  "random",
  "soft_moe",
  "deepseek_v2",
  "deepseek_v3",
  "moe_plus_plus",
)


@pytest.mark.parametrize(
  "name", tiny.often({"hierarchical", "strictly_balanced", "soft_moe"}, PRESETS)
)
def test_presets_train(tmp_path, name):
  # Catches a preset whose learned inputs, losses or state the step does not support, and a router
  # that does not train.
  def changed(c):
    c.model.moe.allow_noncausal_routing = True
    assembly.use_preset(c, name)

  small = dict(
    model__num_layers=1,
    model__moe__first=0,
    model__moe__num_experts=8,
    model__activation="relu",
    optimizer__weight_decay=0.0,
  )
  config, step, state = setup(tmp_path, edit=changed, **small)
  after, m = tiny.quick_jit(functools.partial(step, balance=assembly.balance(config)))(
    state, batch_of(4, 32, padded=5)
  )
  assert (
    np.isfinite(m["loss"])
    and np.isfinite(m["grad_norm"])
    and set(assembly.loss_weights(config)) <= set(m)
  )
  before, after = state.params["layer_0"]["ffn"], after.params["layer_0"]["ffn"]
  moved = {key for key in before if key != "shared" and np.any(before[key] != after[key])}
  others = ("mu", "scale", "shared_gate", "constant_mix", "constant_vectors")
  router = {key for key in before if "router" in key or key in others}
  constant = {"hash": router, "random": router, "base_layers": set()}.get(name, set())
  assert moved == {"up", "down"} | router - constant
