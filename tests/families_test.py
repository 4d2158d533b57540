"""Every paper's config, shrunk by one rule: it trains, saves, goes on from there, evaluates and
reports.

`make test` takes one variant of four families whose state differs most through the whole loop, and
one of each other family through one compiled step; `make test-all` takes all variants through the
loop.
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

from moe_jax import assembly, data, sharding
from moe_jax.run import finish, loop
from moe_jax.run import update as updates
from moe_jax.training import metrics, optimizers, workdir
from moe_jax.training import state as states

pytestmark = pytest.mark.smoke


# A bias that balancing moves and latent attention; recurrent layers and learned noise; sublayers of
# their own; two stacks, span corruption and Adafactor.
LOOP = ("deepseek_v3", "lstm_moe", "brainformer", "gshard")


def _variants():
  """`(family, variant, whether it is as deep as it can be shrunk to)` of each case."""
  for family in FAMILIES:
    for i, variant in enumerate(importlib.import_module(f"configs.{family}").VARIANTS):
      if not i and family in LOOP:
        yield pytest.param(family, variant, False, id=f"{family}:{variant}, shallow")
      yield pytest.param(
        family, variant, True, id=f"{family}:{variant}", marks=pytest.mark.every_variant
      )


def shallow(config):
  """Leaves a dense layer, where the family has them, and one with experts, or one block of a
  Brainformer."""
  m, e = config.model, config.model.moe
  e.first, e.every = min(e.first, 1), min(e.every, 2)
  m.num_layers = 1 if m.block else max(e.first + 1, e.every if e.num_experts else 1)
  m.num_encoder_layers = m.num_layers if m.family == "encoder_decoder" else 0


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in LOOP])
def test_a_shrunk_config_takes_a_step(family, tmp_path):
  # Catches: a config whose parts do not go together once a step is compiled, or one whose
  # parameters do not train.
  config = tiny.shrink(importlib.import_module(f"configs.{family}").get_config(), tmp_path)
  shallow(config)
  assembly.validate(config, 1)
  tokenizer, mesh = data.tokenizer_of(config.data), sharding.make_mesh({"data": 1})
  model = assembly.model(config, data.vocab_size(config.data, tokenizer), mesh)
  optimizer, schedule = optimizers.make(
    optimizers.OptimizerOptions.of(config.optimizer), config.train.steps
  )
  # Compiling what draws the weights would take as long as compiling the step; `LOOP` does it.
  drawn = tiny.weights(
    model, *[jnp.zeros((config.train.batch_size, config.data.seq_len), jnp.int32)] * 3
  )
  before = jax.tree.map(np.array, drawn["params"])  # the step is given the arrays themselves
  with (
    jax.set_mesh(mesh),
    contextlib.closing(
      data.train_iterator(
        config.data, tokenizer, data.make_sources(config.data), config.train.batch_size
      )
    ) as batches,
  ):
    state = states.first_state(drawn, optimizer, jax.random.key(0))
    after, measured = updates.make(config, model, optimizer, schedule)(state, next(batches))
  assert 0 < float(measured["loss"]) < 20 and math.isfinite(float(measured["grad_norm"]))
  moved = jax.tree.map(lambda old, new: bool((old != new).any()), before, after.params)
  assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("family, variant, deep", _variants())
def test_a_shrunk_config_takes_a_step_saves_resumes_and_evaluates(
  family, variant, deep, tmp_path, monkeypatch
):
  # Catches: a config whose parts do not go together once a step is compiled; state of a router, an
  # optimizer or a data pipeline that a checkpoint cannot hold; a model that cannot be evaluated,
  # sampled from or reported on.
  config = tiny.shrink(importlib.import_module(f"configs.{family}").get_config(variant), tmp_path)
  if not deep:
    shallow(config)
  place = tmp_path / "run"
  with monkeypatch.context() as early:
    early.setattr(finish, "finish", lambda *args, **kwargs: {})  # stops after its checkpoint
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
