"""Tests the pull of weights towards those with which their run began."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from moe_jax import load_run
from moe_jax.run import finish, loop
from moe_jax.surgery import workdir as surgery
from moe_jax.training import anchor, optimizers


@pytest.mark.unit
def test_the_gradient_by_hand():
  # The weight began at 1 and is 4 now, so that the gradient of 0.5 * 3^2 is 3, which is added to 2.
  # Catches half of the gradient, a pull away from the start, and an anchor that follows the weight.
  pull = anchor.toward_start(0.5)
  state = pull.init({"w": jnp.array([1.0])})
  for now, expected in ((4.0, 5.0), (0.0, 1.0)):
    updates, state = pull.update({"w": jnp.array([2.0])}, state, {"w": jnp.array([now])})
    assert float(updates["w"][0]) == expected
  assert float(state.start["w"][0]) == 1.0


@pytest.mark.unit
def test_a_heavy_anchor_holds_the_weights():
  # Catches an option that the optimizer does not read, and an anchor that costs a run without it.
  def moved(**options):
    o = optimizers.OptimizerOptions(
      learning_rate=0.01, warmup_steps=0, weight_decay=0.0, clip_norm=0.0, **options
    )
    optimizer, _ = optimizers.make(o, 100)
    weights = {"scale": jnp.ones(3)}
    state = optimizer.init(weights)
    for _ in range(50):
      updates, state = optimizer.update({"scale": jnp.ones(3)}, state, weights)
      weights = optax.apply_updates(weights, updates)
    return float(jnp.abs(weights["scale"] - 1).max()), len(jax.tree.leaves(state))

  (free, leaves), (held, more) = moved(), moved(anchor_weight=100.0)
  assert held < 0.2 * free and more == leaves + 1


@pytest.mark.smoke
def test_an_anchor_is_the_imported_weights_and_survives_a_stop(tmp_path, monkeypatch):
  # Catches an anchor at freshly drawn weights in a run that begins with given ones, one that moves
  # to the weights of a checkpoint from which a run goes on, and memory that is donated twice.
  def train(config, place, steps):
    config.train.steps = steps
    with monkeypatch.context() as changed:
      changed.setattr(finish, "finish", lambda *args, **kwargs: {})
      assert loop.train(config, place, {"config": "tiny", "command": ""})
    return load_run(place).variables["params"]

  first = tiny.config(tmp_path)
  before = train(first, tmp_path / "first", 2)

  def distance(weight, stops):
    config = tiny.config(
      tmp_path, optimizer__anchor_weight=weight, optimizer__schedule="constant", seed=5
    )
    place = tmp_path / f"second_{weight}_{len(stops)}"
    surgery.make(tmp_path / "first", place, config, lambda run, old, new, config: old)
    for steps in stops:
      after = train(config, place, steps)
    parts = jax.tree.map(lambda a, b: float(np.sum((a - b) ** 2)), before, after)
    return sum(jax.tree.leaves(parts))

  held = distance(1e3, [8])
  assert held == distance(1e3, [4, 8]) < 0.5 * distance(0.0, [8])
