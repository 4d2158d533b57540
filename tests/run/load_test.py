"""Tests `load_run`, which makes the model of a run for work in Python."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import moe_jax
from moe_jax import assembly, sharding
from moe_jax.run.load import stored_config
from moe_jax.training import checkpoints, workdir
from moe_jax.training.state import TrainState
from moe_jax.training.step import apply

pytestmark = pytest.mark.unit


def saved(tmp_path):
  """Returns a workdir with one checkpoint of an untrained model, and the model's variables."""
  config = tiny.config(
    tmp_path, model__moe__balancing__rule="sign", model__moe__balancing__rate=0.1
  )
  config.model.moe.router.name = "sigmoid_bias"
  config.model.moe.router.sigmoid_bias.k = 2
  model = assembly.model(config, assembly.vocab_size(config), sharding.make_mesh({"data": 1}))
  ids = jnp.zeros((4, 8), jnp.int32)
  variables = tiny.weights(model, ids, ids + 1, ids)
  bias = {"bias": jnp.arange(2 * 4, dtype=jnp.float32).reshape(2, 4)}
  state = TrainState(
    step=jnp.int32(3),
    params=variables["params"],
    opt_state=(),
    router_state=bias,
    rng=jax.random.key(0),
  )
  place = tmp_path / "run"
  workdir.claim(place, config)
  with checkpoints.Checkpoints(place / "checkpoints") as c:
    c.save(3, state, {}, {"seconds": 1.0})
  return place, {"params": variables["params"], "router_state": bias}


def test_the_model_computes_what_it_computed(tmp_path):
  # Catches weights of another order, a state of balancing that is lost, and a config with defaults
  # in place of the run's values.
  place, variables = saved(tmp_path)
  run = moe_jax.load_run(place)
  assert run.config.model.moe.balancing.rate == 0.1
  for got, wanted in zip(jax.tree.leaves(run.variables), jax.tree.leaves(variables), strict=True):
    np.testing.assert_array_equal(got, wanted)
  assert run.variables.keys() == {"params", "router_state"}
  ids = jnp.ones((4, 8), jnp.int32)
  batch = {"inputs": ids, "targets": ids, "segment_ids": ids, "positions": ids}
  logits, _ = jax.eval_shape(lambda v: apply(run.model, v, batch, train=False), run.variables)
  assert logits.shape[:2] == (4, 8)


def test_what_is_no_run_is_one_sentence(tmp_path):
  # Catches a traceback for a mistyped folder, and another checkpoint than was asked for.
  with pytest.raises(moe_jax.ConfigError, match="holds no config.json"):
    moe_jax.load_run(tmp_path)
  place, _ = saved(tmp_path)
  with pytest.raises(moe_jax.ConfigError, match="step=4.*its checkpoints are 3"):
    moe_jax.load_run(place, step=4)


def test_a_run_of_an_earlier_version_is_read(tmp_path):
  # Catches a run that cannot be loaded any more because a key got another name, and a rule that it
  # loses.
  config = tiny.config(tmp_path)
  config.model.moe.router.name = "sigmoid_bias"
  workdir.claim(tmp_path / "run", config)
  file = tmp_path / "run" / "config.json"
  stored = json.loads(file.read_text())
  del stored["model"]["moe"]["balancing"]
  for rate, rule in ((0.01, "sign"), (0.0, "none")):
    stored["model"]["moe"]["bias_update_rate"] = rate
    file.write_text(json.dumps(stored))
    assert stored_config(tmp_path / "run").model.moe.balancing.rule == rule
