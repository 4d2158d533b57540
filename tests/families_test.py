"""Tests that the config of every paper, shrunk, trains, saves, resumes, evaluates and reports.

`make test` runs the whole loop for one variant of the four families whose states differ most, and
one compiled step for one variant of each other family. `make test-all` runs the loop for all
variants.
"""

import contextlib
import importlib
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from configs_test import FAMILIES
from flax import linen as nn

from configs import quickstart
from moe_jax import assembly, data, sharding
from moe_jax.data.options import DataOptions
from moe_jax.errors import ConfigError
from moe_jax.run import finish, loop
from moe_jax.run import update as updates
from moe_jax.training import metrics, optimizers, workdir
from moe_jax.training import state as states

pytestmark = pytest.mark.smoke


# In this order, they have: a bias that balancing changes, and latent attention; recurrent layers
# and learned noise; a block of sublayers; two stacks, span corruption and Adafactor.
LOOP = ("deepseek_v3", "lstm_moe", "brainformer", "gshard")


def _variants():
  """Yields the cases (family, variant, deep); cases that are not `deep` use `shallow`."""
  for family in FAMILIES:
    for i, variant in enumerate(importlib.import_module(f"configs.{family}").VARIANTS):
      if not i and family in LOOP:
        yield pytest.param(family, variant, False, id=f"{family}:{variant}, shallow")
      yield pytest.param(
        family, variant, True, id=f"{family}:{variant}", marks=pytest.mark.every_variant
      )


def shallow(config):
  """Reduces the number of layers to the fewest that have all kinds of layers of the family.

  This is a dense layer, if the family has any, and one with experts, or one block of a Brainformer.
  """
  m, e = config.model, config.model.moe
  e.first, e.every = min(e.first, 1), min(e.every, 2)
  m.num_layers = 1 if m.block else max(e.first + 1, e.every if e.num_experts else 1)
  m.num_encoder_layers = m.num_layers if m.family == "encoder_decoder" else 0


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in LOOP])
def test_a_shrunk_config_takes_a_step(family, tmp_path):
  # Catches a config whose parts do not work together when a step is compiled, and parameters that
  # are not trained.
  config = tiny.shrink(importlib.import_module(f"configs.{family}").get_config(), tmp_path)
  shallow(config)
  assembly.validate(config, 1)
  options = DataOptions.of(config.data)
  tokenizer, mesh = data.tokenizer_of(options), sharding.make_mesh({"data": 1})
  model = assembly.model(config, data.vocab_size(options, tokenizer), mesh)
  optimizer, schedule = optimizers.make(
    optimizers.OptimizerOptions.of(config.optimizer), config.train.steps
  )
  # Compiling the model's initialisation would take as long as compiling the step. It is tested with
  # the families in `LOOP`.
  drawn = tiny.weights(
    model, *[jnp.zeros((config.train.batch_size, config.data.seq_len), jnp.int32)] * 3
  )
  # Copies the weights, because the step is given the arrays themselves and may reuse their memory.
  before = jax.tree.map(np.array, drawn["params"])
  with (
    jax.set_mesh(mesh),
    contextlib.closing(
      data.train_iterator(options, tokenizer, data.make_sources(options), config.train.batch_size)
    ) as batches,
  ):
    state = states.first_state(drawn, optimizer, jax.random.key(0))
    after, measured = updates.make(config, model, optimizer, schedule)(state, next(batches))
  assert 0 < float(measured["loss"]) < 20 and math.isfinite(float(measured["grad_norm"]))
  moved = jax.tree.map(lambda old, new: bool((old != new).any()), before, after.params)
  assert all(jax.tree.leaves(moved))


def _causal(preset):
  """Returns whether a causal model accepts a preset without being told to."""
  config = quickstart.get_config()
  assembly.use_preset(config, preset)
  try:
    assembly.validate(config, 1)
  except ConfigError as error:
    assert "causal" in str(error), error
    return False
  return True


@pytest.mark.every_variant
@pytest.mark.parametrize("preset", assembly.PRESETS)
def test_a_causal_preset_trains_the_quickstart(preset):
  # Twenty steps of the quickstart, whose loss begins at ln 256 = 5.5 or above. Catches a router or
  # a loss whose gradient is wrong or not finite, and a rule of balancing that breaks the routing.
  if not _causal(preset):
    pytest.skip("lets later tokens decide what earlier ones get")
  config = quickstart.get_config()
  assembly.use_preset(config, preset)
  config.train.steps = 20
  options = DataOptions.of(config.data)
  tokenizer, mesh = data.tokenizer_of(options), sharding.make_mesh({"data": 1})
  model = assembly.model(config, data.vocab_size(options, tokenizer), mesh)
  optimizer, schedule = optimizers.make(
    optimizers.OptimizerOptions.of(config.optimizer), config.train.steps
  )
  inputs = [jnp.zeros((config.train.batch_size, config.data.seq_len), jnp.int32)] * 3
  losses = []
  with (
    jax.set_mesh(mesh),
    contextlib.closing(
      data.train_iterator(options, tokenizer, data.make_sources(options), config.train.batch_size)
    ) as batches,
  ):
    variables = nn.unbox(
      jax.jit(lambda key: model.init(key, *inputs, train=False))(jax.random.key(0))
    )
    state = states.first_state(variables, optimizer, jax.random.key(1))
    step = updates.make(config, model, optimizer, schedule)
    for _ in range(20):
      state, measured = step(state, next(batches))
      losses.append(float(measured["loss"]))
      assert math.isfinite(float(measured["grad_norm"]))
  assert losses[0] > 5 and losses[-1] < losses[0] - 1.5, losses


@pytest.mark.parametrize("family, variant, deep", _variants())
def test_a_shrunk_config_takes_a_step_saves_resumes_and_evaluates(
  family, variant, deep, tmp_path, monkeypatch
):
  # Catches a config whose parts do not work together when a step is compiled, state of a router, an
  # optimizer or a data pipeline that a checkpoint cannot hold, and a model that cannot be
  # evaluated, sampled from or reported on.
  config = tiny.shrink(importlib.import_module(f"configs.{family}").get_config(variant), tmp_path)
  if not deep:
    shallow(config)
  place = tmp_path / "run"
  with monkeypatch.context() as early:
    # The first run stops after its checkpoint.
    early.setattr(finish, "finish", lambda *args, **kwargs: {})
    _train(config, place, 1)
  _train(config, place, 2)
  results = json.loads((place / "results.json").read_text())
  assert results["steps"] == 2 and all(0 < loss < 6.5 for loss in results["loss"].values())
  lines = metrics.read(place / "metrics.jsonl")
  assert [(line["step"], line["kind"]) for line in lines] == [
    (n, kind) for n in (1, 2) for kind in ("train", "eval")
  ]
  assert math.isfinite(lines[2]["loss"]) and lines[0]["loss"] != lines[2]["loss"]
  assert json.loads((place / "meta.json").read_text())["starts"][1]["step"] == 1
  assert (place / "report.html").stat().st_size


def _train(config, place, steps):
  config.train.steps = steps
  assembly.validate(config, 1)
  workdir.check(place, config)
  assert loop.train(config, place, {"config": "shrunk", "command": ""})
