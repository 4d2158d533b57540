"""Checks that seeds which are trained together end like seeds which are trained alone."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import linen as nn

from experiments.common import seeds
from moe_jax import assembly, data, sharding, train
from moe_jax.commands import parse
from moe_jax.data.options import DataOptions
from moe_jax.run import update
from moe_jax.training import checkpoints
from moe_jax.training.state import TrainState, init_state

pytestmark = pytest.mark.smoke
NOISY = {
  "model__dropout": 0.1,
  "model__moe__jitter": 0.1,
}  # so that a key shared by seeds would show


def command(directory, name, *more, **changes):
  return [
    "seeds",
    "--config=configs/quickstart.py",
    f"--workdir={directory / name}",
    *tiny.flags(directory, **(NOISY | changes)),
    *more,
  ]


def found(directory, name):
  return json.loads((directory / name / "results.json").read_text())


@pytest.mark.parametrize("together", [True, pytest.param(False, marks=pytest.mark.every_variant)])
def test_seeds_together_are_seeds_alone(tmp_path, together):
  # Catches one key for all seeds, seeds that see each other, a wrong axis, and another order of the
  # data.
  config = parse(command(tmp_path, "unused", train__batch_size=4)).config
  options = DataOptions.of(config.data)
  tokenizer, sources = data.tokenizer_of(options), data.make_sources(options)
  model = assembly.model(
    config, data.vocab_size(options, tokenizer), sharding.make_mesh({"data": 1})
  )
  optimizer = optax.sgd(
    0.1, momentum=0.9
  )  # Adam's quotient makes much of rounding where gradients are small
  make = functools.partial(
    update.make, config, optimizer=optimizer, schedule=optax.constant_schedule(0.1)
  )
  step = make(model)
  batches = data.train_iterator(options, tokenizer, sources, 4)
  batches = [next(batches) for _ in range(3)]
  alone = []
  for seed in range(2):
    state = tiny.quick_jit(lambda key: init_state(model, optimizer, key, 32, 4))(
      jax.random.key(seed)
    )
    losses = []
    for batch in batches:
      state, metrics = step(state, batch)
      losses.append(float(metrics["loss"]))
    alone.append((state, losses))
  state = tiny.quick_jit(functools.partial(seeds.draw, model, optimizer, 2, 32, 4))()
  all_seeds, losses = jax.jit(seeds.over_seeds(make, model, 2, together)), []
  for batch in batches:
    state, metrics = all_seeds(state, batch)
    losses.append(np.asarray(metrics["loss"]))
  assert int(state.step) == 3
  for seed, (one, expected) in enumerate(alone):
    np.testing.assert_allclose(np.array(losses)[:, seed], expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(state.params), strict=True):
      np.testing.assert_allclose(b[seed], a, rtol=1e-5, atol=1e-5)
  assert abs(alone[0][1][0] - alone[1][1][0]) > 1e-3  # or the comparison could not fail


class Seeded(nn.Module):
  """Stands for a model; only its seed is read."""

  seed: int | jax.Array = 0


@pytest.mark.parametrize("together", [True, False])
def test_each_seed_has_a_model_of_that_seed(together):
  # Catches one model, and so one hash of routers that learn nothing, for all seeds, in training or
  # in evaluation.
  state = TrainState(
    step=jnp.int32(0), params=jnp.zeros(3), opt_state={}, router_state={}, rng=jnp.zeros(3)
  )
  step = seeds.over_seeds(
    lambda model: lambda state, batch: (state, model.seed + batch), Seeded(), 3, together
  )
  np.testing.assert_array_equal(step(state, 10)[1], [10, 11, 12])
  one = functools.partial(
    lambda params, router_state, batch, lengths, model: model.seed + batch, model=Seeded()
  )
  np.testing.assert_array_equal(
    seeds.over_states(Seeded(), 3, together, one)(state.params, {}, 10, 0), [10, 11, 12]
  )


def test_a_run_leaves_the_figures_of_each_seed(tmp_path):
  # Catches figures of one seed in another's place, curves without an axis, layers that are not
  # reduced.
  assert seeds.main(command(tmp_path, "a", "--seeds=2")) == 0
  said = found(tmp_path, "a")
  assert (
    said["seeds"] == 2
    and said["steps"] == 6
    and said["tokens"] == 6 * 4 * 32
    and said["diverged"] == [None] * 2
  )
  assert said["train"]["step"] == [2, 4, 6] and said["eval"]["step"] == [3, 6]
  for name in (
    "loss",
    "cross_entropy",
    "grad_norm",
    "logit_max",
    "drop_rate",
    "entropy",
    "load_cv",
  ):
    assert np.array(said["train"][name]).shape == (2, 3), name
  assert np.array(said["eval"]["bits_per_byte"]).shape == (2, 2)
  assert [seed[-1] for seed in said["eval"]["bits_per_byte"]] == said["mean_bits_per_byte"]
  assert said["mean_bits_per_byte"][0] != said["mean_bits_per_byte"][1]
  (values,) = said["bits_per_byte"].values()
  assert values == pytest.approx(said["mean_bits_per_byte"])
  load = np.array(said["load"]["layers"])
  assert load.shape == (1, 3, 4)
  np.testing.assert_allclose(load.sum(axis=-1), 1.0, atol=1e-3)
  assert (
    0 < said["step_cpu_seconds"] and said["parameters"]["activated"] < said["parameters"]["total"]
  )


@pytest.mark.every_variant
def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path, capsys):
  # Catches a state, a place in the data or curves that are not restored, and other seeds, fewer
  # steps or a run of one seed that go on in a folder of these.
  constant = {"optimizer__schedule": "constant"}  # or the rate would depend on train.steps
  assert (
    seeds.main(command(tmp_path, "cut", "--seeds=2", "--apart", train__steps=4, **constant)) == 0
  )
  assert seeds.main(command(tmp_path, "cut", "--seeds=2", "--apart", **constant)) == 0
  assert seeds.main(command(tmp_path, "one", "--seeds=2", "--apart", **constant)) == 0
  cut, one = found(tmp_path, "cut"), found(tmp_path, "one")
  assert cut["train"] == one["train"] and cut["mean_bits_per_byte"] == one["mean_bits_per_byte"]
  assert cut["load"] == one["load"] and checkpoints.steps(tmp_path / "cut" / "checkpoints")[-1] == 6
  for wrong in (
    ["--seeds=3"],
    ["--seeds=2", "--config.seed=5"],
    ["--seeds=2", "--config.train.steps=4"],
  ):
    assert seeds.main(command(tmp_path, "cut", "--apart", *wrong, **constant)) == 2, wrong
  assert train.main(command(tmp_path, "cut", **constant)) == 2
  said = capsys.readouterr().err
  assert "seed=[0, 1, 2]: the run in" in said and "seed='5': is not read here" in said
  assert "train.steps=4: the run is already at step 6" in said and "seed=0: the run in" in said
  assert found(tmp_path, "cut") == cut


def test_a_seed_that_diverges_stops_alone_and_all_of_them_end_the_run():
  # Catches one NaN that stops healthy seeds, and a step of divergence that moves later.
  record = seeds.Record.empty(3)
  good, bad = np.ones(3), np.array([1.0, np.nan, 1.0])
  record.steps([(1, {"loss": good, "grad_norm": good}), (2, {"loss": good, "grad_norm": bad})])
  record.steps([(3, {"loss": bad, "grad_norm": np.array([np.inf, 1.0, 1.0])})])
  assert record.diverged == [3, 2, None]


@pytest.mark.every_variant
def test_a_run_of_which_no_seed_is_left_ends(tmp_path):
  # Catches NaNs that are trained to the end, or written as NaN, which no JSON reader takes.
  assert (
    seeds.main(
      command(
        tmp_path,
        "hot",
        "--seeds=2",
        optimizer__learning_rate=1e20,
        optimizer__clip_norm=0.0,
        optimizer__warmup_steps=0,
      )
    )
    == 0
  )
  said = found(tmp_path, "hot")
  assert all(said["diverged"]) and said["steps"] < 6 and said["mean_bits_per_byte"] == [None, None]
  assert "NaN" not in (tmp_path / "hot" / "results.json").read_text()


@pytest.mark.parametrize("flags", [[], ["--seeds=0"], ["--seeds=two"], ["--seeds=2", "--seeds=3"]])
def test_a_wrong_number_of_seeds_is_refused(tmp_path, capsys, flags):
  assert seeds.main(command(tmp_path, "none", *flags)) == 2
  assert "seeds" in capsys.readouterr().err


def test_shares_that_follow_losses_are_refused(tmp_path, capsys):
  # Catches seeds that silently train with the shares of data.weights.
  losses = {"data__sources": "('text:a', 'text:b')", "data__dynamic__references": "(1.0, 1.0)"}
  argv = command(tmp_path, "none", "--seeds=2", data__dynamic__every=3, **losses)
  assert seeds.main(argv) == 2
  err = capsys.readouterr().err
  assert "data.dynamic.every=3: seeds that train together read the same batches" in err
