"""Checks the cases of the benchmark and its count of FLOPs, without a clock."""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn

from experiments.bench import dispatchers as run
from experiments.bench import generation, routing, training_step
from moe_jax.errors import ConfigError
from moe_jax.routing import ROUTERS

pytestmark = pytest.mark.unit

SMALL = run.Shape(tokens=64, d_model=8, d_ff=12, experts=4, k=2, activation="swiglu")


def silent(what):
  """Shows no progress."""


@pytest.mark.parametrize("name", tiny.often({"S2"}, run.SHAPES))
def test_every_case_builds(monkeypatch, name):
  # With narrow experts, and traced in place of compiled. Catches: a row whose dispatcher or
  # implementation is not there, groups that do not divide the tokens, arguments that a dispatcher
  # no longer takes.
  shape = run.SHAPES[name]._replace(d_model=8, d_ff=4)
  monkeypatch.setattr(
    run, "compiled", lambda function, *args, constants=0: jax.eval_shape(function, *args)
  )
  x, logits, experts = run.workload(shape)
  assert run.dense(shape, experts)[0].shape == (shape.tokens * shape.k, 8)
  for row in (run.ROWS | run.SLOW).values():
    y, trips = run.layer(shape, row, x, logits, experts)
    assert y.shape == (
      shape.tokens // (row.tokens_per_group or shape.tokens),
      row.tokens_per_group or shape.tokens,
      8,
    )
    assert (
      sum(count for loop, count in trips.items() if loop.startswith("experts_of_")) <= shape.experts
    )


@pytest.mark.parametrize("name", routing.OPTIONS)
def test_every_router_builds(name):
  # Catches options that a router no longer takes, stand-ins for experts that a dispatcher cannot
  # use.
  x, weight = jnp.zeros((SMALL.tokens, SMALL.d_model)), jnp.zeros((SMALL.d_model, SMALL.experts))
  for experts in (run.workload(SMALL)[2], routing.Copies(jnp.zeros((SMALL.experts, 1)))):
    y = jax.eval_shape(
      lambda x, w, inner: routing.layer(name, x, w, inner, "cpu"), x, weight, experts
    )
    assert y.shape == (1, SMALL.tokens, SMALL.d_model)


def test_every_causal_router_is_timed():
  # Catches a new router without a row.
  causal = {name for name, router in ROUTERS.items() if router.leak() != "yes"}
  assert causal <= routing.OPTIONS.keys()


def test_flops_are_those_of_the_rows():
  # The ideal is the matmuls of tokens * k rows, three times as many with the backward pass. The
  # dense FFN has just those, experts with 1.25 slots an assignment 1.25 times as many, and grouped
  # ones whole chunks of rows. Catches: an ideal without the gate's matrix or without K, a backward
  # pass whose first product XLA leaves out, loops whose trips are not counted, a row measured at
  # another capacity than its name says.
  rows = {name: run.ROWS[name] for name in ("grouped", "scatter, capacity 1.25")}
  found = run.measure("small", SMALL, rows, 1, silent)
  for part in ("forward_flops_ratio", "backward_flops_ratio"):
    assert found["dense FFN"][part] == 1.0
    assert found["scatter, capacity 1.25"][part] == 1.25
    assert 1.0 <= found["grouped"][part] <= 1.6


def test_a_training_step_is_compiled_once_and_begins_with_the_first_weights(caplog):
  # Catches a key of the config that is gone, a state that the second step compiles anew for, and
  # losses that the comparison could not tell apart. Random weights predict nothing: log V nats.
  case = training_step.Case(generation.Shape(16, 8, 1, 2, 50, 2, 8), rows=2, length=16)
  model = generation.ours(case.shape)
  tokens = np.random.default_rng(0).integers(1, 50, (2, 17))
  ids = jnp.ones((2, 16), jnp.int32)
  variables = nn.meta.unbox(model.init(jax.random.key(0), ids, ids, ids, train=False))
  step = training_step.our_step(case, {"params": variables["params"]}, tokens)
  with jax.log_compiles():
    first = step()
    assert "Compiling" in caplog.text
    caplog.clear()
    second = step()
  assert "Compiling" not in caplog.text and abs(first - np.log(50)) < 1.0 and second != first
  for one in training_step.CASES.values():
    assert training_step.our_config(one).model.d_model == one.shape.d_model


def test_the_decoding_model_builds():
  # Catches a key of the config that is gone, and a shape whose heads do not fit its width.
  for shape in generation.SHAPES.values():
    model = generation.ours(shape._replace(layers=1))
    ids = jnp.ones((1, 4), jnp.int32)
    variables = jax.eval_shape(
      lambda key, model=model, ids=ids: model.init(key, ids, ids, ids, train=False),
      jax.random.key(0),
    )
    up = variables["params"]["layer_0"]["ffn"]["up"].value
    assert up.shape == (generation.EXPERTS, shape.d_model, shape.d_ff)


def test_decoding_flags_are_checked():
  # Catches a batch of no rows, which would be found after minutes.
  options = argparse.Namespace(
    shapes="tiny", batches="1,0", prompt=4, tokens=4, repeats=1, out=None, experts=""
  )
  with pytest.raises(ConfigError, match="batches"):
    generation.action(options)


def test_the_figure_shows_the_results():
  # Catches a figure of an older measurement.
  folder = pathlib.Path(run.__file__).parent
  report = json.loads((folder / "results.json").read_text())
  assert (folder / "results.svg").read_text() == run.figure(report)
