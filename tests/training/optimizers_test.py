"""Schedules have the right values at their corners, and optimizers treat each kind of parameter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from moe_jax import assembly
from moe_jax.errors import ConfigError
from moe_jax.training import optimizers

pytestmark = pytest.mark.unit


def rates(name, at, *, steps=100, warmup=10, **options):
  options = {
    "final_fraction": 0.1,
    "decay_fraction": 0.2,
    "milestones": (0.6, 0.9),
    "milestone_factor": 0.5,
  } | options
  schedule = optimizers.SCHEDULES[name](2.0, steps, warmup, **options)
  return [float(schedule(jnp.int32(step))) for step in at]


@pytest.mark.parametrize("name", [name for name in optimizers.SCHEDULES if name != "flat_rsqrt"])
def test_warmup_is_a_line_that_reaches_the_peak(name):
  # Catches a first step with the rate 0, and a warm-up that ends one step early or late.
  after = 2 * (10 / 11) ** 0.5 if name == "rsqrt" else 2.0
  np.testing.assert_allclose(rates(name, [0, 4, 9, 10]), [0.2, 1.0, 2.0, after], rtol=1e-5)


@pytest.mark.parametrize(
  "name, at, expected",
  [
    # The rate is final_fraction * peak at the last step and after it.
    ("cosine", [99, 200], [0.2, 0.2]),
    ("cosine", [10 + 89 // 2], [2 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * 44 / 89)))]),
    ("rsqrt", [39, 89], [2 * (10 / 40) ** 0.5, 2 * (10 / 90) ** 0.5]),
    # The rate is constant, and then falls linearly over the last 20 steps.
    ("wsd", [50, 79, 89, 99], [2.0, 2.0, 1.1, 0.2]),
    ("constant", [50, 99, 1000], [2.0, 2.0, 2.0]),
    # The rate is at its peak from the first step on.
    ("flat_rsqrt", [0, 9, 10, 39], [2.0, 2.0, 2 * (10 / 11) ** 0.5, 1.0]),
    ("steps", [59, 60, 89, 90, 99, 1000], [2.0, 1.0, 1.0, 0.5, 0.5, 0.5]),
  ],
)
def test_after_the_warmup(name, at, expected):
  # Catches a decay that misses final_fraction at the last step, and an rsqrt of (step - warmup).
  np.testing.assert_allclose(rates(name, at), expected, rtol=1e-5)


@pytest.mark.parametrize("name", optimizers.SCHEDULES)
def test_no_warmup(name):
  # Catches a division by zero if warmup_steps is 0.
  assert np.isfinite(rates(name, [0, 1, 99], warmup=0)).all()
  assert rates(name, [0], warmup=0) == [2.0]


def settings(**changes):
  simple = {"warmup_steps": 0, "schedule": "constant", "learning_rate": 0.5}
  return optimizers.OptimizerOptions(**simple | changes)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_weight_decay_only_on_matrices(name):
  # Catches weight decay of norm scales, also of those that a scan over layers stacks into a matrix.
  params = {
    "kernel": jnp.ones((2, 3)),
    "norm": {"scale": jnp.ones(3)},
    "repeats": {"norm": {"scale": jnp.ones((4, 3))}},
  }
  optimizer, _ = optimizers.make(settings(name=name, weight_decay=0.1), 10)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(zeros, optimizer.init(params), params)
  np.testing.assert_allclose(updates["kernel"], -0.5 * 0.1, rtol=1e-5)
  np.testing.assert_allclose(updates["norm"]["scale"], 0.0, atol=1e-7)
  np.testing.assert_allclose(updates["repeats"]["norm"]["scale"], 0.0, atol=1e-7)


def test_adamw_first_step_is_the_sign_times_the_rate():
  # Catches b1 and b2 that are exchanged, and a missing bias correction. In both cases the first
  # step would not be g / |g|.
  optimizer, _ = optimizers.make(settings(weight_decay=0.0, clip_norm=0.0), 10)
  params = {"w": jnp.zeros((1, 2))}
  updates, _ = optimizer.update({"w": jnp.array([[3.0, -0.01]])}, optimizer.init(params), params)
  np.testing.assert_allclose(updates["w"], [[-0.5, 0.5]], rtol=1e-4)


def test_gradients_are_clipped_by_their_global_norm():
  # Catches clipping by value or by leaf. The norm of (3, 4) is 5, so both gradients shrink to a
  # fifth, which Adam's first moment shows.
  params = {"a": jnp.zeros((1, 1)), "b": jnp.zeros((1, 1))}
  optimizer, _ = optimizers.make(settings(weight_decay=0.0, clip_norm=1.0), 10)
  _, state = optimizer.update(
    {"a": jnp.full((1, 1), 3.0), "b": jnp.full((1, 1), 4.0)}, optimizer.init(params), params
  )
  mu = next(s.mu for s in state[1] if hasattr(s, "mu"))
  np.testing.assert_allclose([mu["a"].item(), mu["b"].item()], [0.1 * 0.6, 0.1 * 0.8], rtol=1e-4)


def test_adafactor_factors_its_second_moment():
  # Catches an Adafactor that stores whole second moments, although its purpose is to avoid that.
  params = {"w": jnp.ones((256, 512))}
  optimizer, _ = optimizers.make(settings(name="adafactor", weight_decay=0.0), 10)
  assert sum(x.size for x in jax.tree.leaves(optimizer.init(params))) < 2000


def adafactor_alone(weight, gradients, rate, clip):
  """Applies Adafactor (Shazeer and Stern 2018, Algorithms 4 and 5) to one array, in NumPy."""

  def rms(x):
    return np.sqrt(np.mean(np.square(x)))

  moments = [0.0, 0.0]
  for t, gradient in enumerate(gradients, 1):
    beta, square = 1 - t**-0.8, np.square(gradient) + 1e-30
    means = (
      [square.mean(-1, keepdims=True), square.mean(-2, keepdims=True)]
      if square.ndim == 2
      else [square, 1.0]
    )
    moments = [beta * v + (1 - beta) * mean for v, mean in zip(moments, means, strict=True)]
    second = moments[0] * moments[1] / moments[0].mean() if square.ndim == 2 else moments[0]
    update = gradient / np.sqrt(second)
    weight = weight - rate * max(rms(weight), 1e-3) * update / max(1, rms(update) / clip)
  return weight


def test_adafactor_takes_layers_and_experts_each_alone():
  # The shapes are [layers, E, D, F] and [layers, E, F]. E is the longest axis of the first, so that
  # optax by itself would factor it. Catches second moments that are averaged over experts, and
  # updates that are clipped or scaled depending on other experts or layers.
  rng = np.random.default_rng(0)
  shapes = {"up": (1, 131, 128, 130), "hidden_bias": (2, 3, 130)}

  def scale(shape):
    return np.exp(rng.normal(size=shape[:2])).reshape(*shape[:2], *(1,) * (len(shape) - 2))

  def draw():
    return {
      name: (scale(shape) * rng.normal(size=shape)).astype(np.float32)
      for name, shape in shapes.items()
    }

  weights, gradients, tree = (
    draw(),
    [draw(), draw()],
    lambda leaves: {"repeats": {"layer_0": {"ffn": leaves}}},
  )
  optimizer, _ = optimizers.make(
    settings(
      name="adafactor",
      weight_decay=0.0,
      clip_norm=0.0,
      update_clip=0.9,
      schedule="constant",
      warmup_steps=0,
      learning_rate=0.01,
    ),
    10,
  )
  params = tree(jax.tree.map(jnp.asarray, weights))
  state = optimizer.init(params)
  # The largest array is v_col.
  assert max(x.size for x in jax.tree.leaves(state)) == 131 * 130
  for gradient in gradients:
    updates, state = optimizer.update(tree(gradient), state, params)
    params = jax.tree.map(jnp.add, params, updates)
  for name, actual in params["repeats"]["layer_0"]["ffn"].items():
    for at in [(0, 0), (0, 2), (-1, 1)]:
      wanted = adafactor_alone(
        weights[name][at], [gradient[name][at] for gradient in gradients], 0.01, 0.9
      )
      np.testing.assert_allclose(actual[at], wanted, rtol=1e-4, atol=1e-6)


def test_adafactor_clips_its_updates():
  # Catches an update_clip that is not read, or only after the step was scaled by the weights' RMS.
  # Adafactor's first step divides a gradient by its own size, so that an update of RMS 1 is clipped
  # to update_clip.
  def step(clip):
    optimizer, _ = optimizers.make(
      settings(name="adafactor", weight_decay=0.0, clip_norm=0.0, update_clip=clip), 10
    )
    params = {"w": jnp.full((2, 2), 3.0)}
    return optimizer.update({"w": jnp.full((2, 2), 7.0)}, optimizer.init(params), params)[0]["w"]

  np.testing.assert_allclose(step(1.0), -0.5 * 3.0, rtol=1e-3)
  np.testing.assert_allclose(step(0.1), -0.5 * 3.0 * 0.1, rtol=1e-3)


@pytest.mark.parametrize(
  "key, value, words",
  [
    ("milestones", (0.9, 0.8), "ascending"),
    ("milestones", (0.5, 1.0), "between 0 and 1"),
    ("milestone_factor", 0.0, "above 0"),
    ("update_clip", 0.0, "above 0"),
    ("name", "adamW", "'adamw'"),
    ("schedule", "cosin", "'cosine'"),
    ("learning_rate", -1.0, "above 0"),
    ("final_fraction", 1.5, "at most 1"),
    ("b1", 1.0, "below 1"),
    ("momentum", 1.0, "below 1"),
    ("newton_schulz_steps", 0, "at least 1"),
    ("update_rms", 0.0, "above 0"),
    ("clip_norm", -1.0, "at least 0"),
  ],
)
def test_mistakes_name_the_field(key, value, words):
  # Catches a mistake that only optax would notice.
  config = base.get_config()
  config.optimizer[key] = value
  with pytest.raises(ConfigError, match=words) as error:
    assembly.validate(config)
  assert error.value.field == f"optimizer.{key}"


def test_frozen_parameters_never_change():
  # Catches weight decay of frozen parameters, and a global norm that includes their gradients and
  # would thus shrink all other steps.
  params = {"ffn": {"router": jnp.ones((2, 2)), "up": jnp.ones((2, 2))}}
  grads = {"ffn": {"router": jnp.full((2, 2), 1e6), "up": jnp.full((2, 2), 0.1)}}

  def updates(o, grads):
    optimizer, _ = optimizers.make(o, 10)
    return optimizer.update(grads, optimizer.init(params), params)[0]["ffn"]

  whole = optimizers.OptimizerOptions()
  frozen = updates(dataclasses.replace(whole, freeze=("router",)), grads)
  alone = updates(whole, {"ffn": grads["ffn"] | {"router": jnp.zeros((2, 2))}})
  assert not np.any(frozen["router"]) and np.any(frozen["up"])
  np.testing.assert_allclose(frozen["up"], alone["up"])


def test_freezing_what_there_is_not():
  # Catches a misspelt name, whose parameter would silently train.
  o = optimizers.OptimizerOptions(freeze=("ruoter",))
  with pytest.raises(ConfigError, match="did you mean 'router'"):
    optimizers.make(o, 10)[0].init({"router": jnp.ones(2), "up": jnp.ones(2)})


def test_what_decays():
  # Biases of heads, buckets and experts have two or more axes, and a multiplicative bias begins at
  # 1. Catches weight decay that depends on the number of axes alone, and a comparison with whole
  # names instead of their endings.
  params = {
    name: jnp.ones((2, 3, 4))
    for name in (
      "scale",
      "query_bias",
      "relative_bias",
      "hidden_bias",
      "router_threshold",
      "up",
      "router",
    )
  }
  assert {name for name, decays in optimizers.decayed(params).items() if decays} == {"up", "router"}
