"""Trains several seeds of one config in one program.

  python -m experiments.common.seeds --config=configs/X.py --workdir=DIR --seeds=N [--apart]
    [--config.KEY=VALUE ...]

The program is the update of `moe_jax.train` with an axis of seeds on all of its state. It trains
seeds 0 to N-1 on the same batches, on one device: by `jax.vmap` over the whole training step, or
with --apart one after another in each step, with the same numbers. The latter, `jax.lax.map`, needs
memory for the activations of one seed only. Each seed has its own weights, noise, and fixed hash of
routers that learn nothing, as if it were trained alone. A seed whose loss is no longer finite does
not stop the others. The same command goes on from its last checkpoint after a kill. The figures in
DIR/results.json have an axis of seeds, see `results`. Exit codes are those of `moe_jax.train`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import logging
import math
import pathlib
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from tqdm import tqdm

from experiments.common.entry import guarded, keep_memory, parse
from moe_jax import accounts, assembly, data, sharding
from moe_jax.data.options import DataOptions
from moe_jax.errors import ConfigError
from moe_jax.run import update
from moe_jax.training import evaluate, optimizers, workdir
from moe_jax.training.checkpoints import Checkpoints
from moe_jax.training.interrupt import Interrupt
from moe_jax.training.metrics import plain
from moe_jax.training.options import TrainOptions
from moe_jax.training.state import TrainState, init_state
from moe_jax.training.step import Batch

# The fields of a state of which each seed has its own.
VARIED = ("params", "opt_state", "router_state", "rng")
# Metrics of the router -> the function that makes one number of those of the layers.
MOE = {
  "logit_max": np.max,
  "drop_rate": np.mean,
  "dropped_tokens": np.mean,
  "entropy": np.mean,
  "max_violation": np.mean,
}
SCALARS = ("loss", "cross_entropy", "grad_norm")
MAPS = 50  # the most moments at which the load of each expert is kept


def draw(model, optimizer, seeds: int, seq_len: int, batch_size: int) -> TrainState:
  """Returns the initial states of seeds 0 to N-1, each as `init_state` draws it. Traceable.

  All leaves except `step` have a first axis of seeds.
  """
  keys = jax.numpy.stack([jax.random.key(seed) for seed in range(seeds)])
  return jax.vmap(
    lambda key: init_state(model, optimizer, key, seq_len, batch_size), out_axes=_axes()
  )(keys)


def over_seeds(make: Callable, model: nn.Module, seeds: int, together: bool = True) -> Callable:
  """Returns `step(state, batch) -> (state, metrics)` for a state of `draw`.

  The metrics have a first axis of seeds.

  Args:
    make: Maps a model to the step of one seed, as `run.update.make` returns it.
    model: The model of any seed. Each seed trains a clone with its own `seed`, on which routers
      that learn nothing depend.
    seeds: N, the number of seeds.
    together: Whether the seeds are vmapped. Otherwise they are trained one after another.
  """

  def step(seed, state, batch):
    return make(model.clone(seed=seed))(state, batch)

  numbers = jax.numpy.arange(seeds)
  if together:
    over = jax.vmap(step, in_axes=(0, _axes(), None), out_axes=(_axes(), 0))
    return lambda state, batch: over(numbers, state, batch)

  def mapped(state: TrainState, batch: Batch):
    def one(seed_and_fields):
      seed, fields = seed_and_fields
      new, metrics = step(seed, state.replace(**fields), batch)
      return {name: getattr(new, name) for name in VARIED}, metrics

    fields, metrics = jax.lax.map(one, (numbers, {name: getattr(state, name) for name in VARIED}))
    return state.replace(step=state.step + 1, **fields), metrics

  return mapped


def over_states(model: nn.Module, seeds: int, together: bool, step: Callable) -> Callable:
  """Returns an evaluation step of all seeds, each with its own `model.seed`.

  Args:
    model: The model of any seed.
    seeds: N, the number of seeds.
    together: Whether the seeds are vmapped. Otherwise they are evaluated one after another.
    step: The evaluation step of one seed, a partial that binds its `model`.
  """

  def one(seed, params, router_state, *rest):
    return step(params, router_state, *rest, model=model.clone(seed=seed))

  numbers = jax.numpy.arange(seeds)
  if together:
    over = jax.vmap(one, in_axes=(0, 0, 0, None, None))
    return lambda *args: over(numbers, *args)
  return lambda params, router_state, *rest: jax.lax.map(
    lambda of_seed: one(*of_seed, *rest), (numbers, params, router_state)
  )


def _axes() -> TrainState:
  """Returns the vmapped axes of a state: the seeds share its `step` only."""
  axes: Any = {"step": None, **dict.fromkeys(VARIED, 0)}
  return TrainState(**axes)


@dataclasses.dataclass
class Record:
  """The course of the training of N seeds so far, which is saved with each checkpoint.

  Attributes:
    train: "step" [T], and the curves [N][T] of `SCALARS` and of the router's metrics.
    eval: "step" [T'], and the measure [N][T'], averaged over the sources.
    load: "step" [T''], and "layers" [T''][Lm][E], each expert's share of the assignments of seed 0.
    diverged: [N], the first step whose loss or gradient was not finite. None means that all were.
    times: The wall seconds and the CPU seconds of a step of all seeds, averaged over the steps
      between two synchronisations with the device.
  """

  train: dict[str, list]
  eval: dict[str, list]
  load: dict[str, list]
  diverged: list[int | None]
  times: list[list[float]]

  @classmethod
  def empty(cls, seeds: int) -> Record:
    """Returns the record of a training that has not begun."""
    return cls({"step": []}, {"step": []}, {"step": [], "layers": []}, [None] * seeds, [])

  def steps(self, done: Sequence[tuple[int, dict[str, np.ndarray]]]) -> None:
    """Notes which seeds diverged in the steps since the last call."""
    for n, metrics in done:
      finite = np.isfinite(metrics["loss"]) & np.isfinite(metrics["grad_norm"])
      self.diverged = [
        before if before is not None or good else n
        for before, good in zip(self.diverged, finite, strict=True)
      ]

  def point(self, n: int, metrics: dict[str, np.ndarray], maps_every: int) -> None:
    """Adds the metrics of step `n` to the curves, and the loads once every `maps_every` steps."""
    self.train["step"].append(n)
    values: dict[str, Any] = {name: metrics[name] for name in SCALARS}
    moe = {
      name.removeprefix("moe/"): value for name, value in metrics.items() if name.startswith("moe/")
    }
    values |= {name: reduce(moe[name], axis=-1) for name, reduce in MOE.items() if name in moe}
    if "load" in moe:  # [N, Lm, E]
      values["load_cv"] = np.std(moe["load"] * moe["load"].shape[-1], axis=-1).mean(axis=-1)
      if n // maps_every > (self.load["step"] or [0])[-1] // maps_every:
        self.load["step"].append(n)
        self.load["layers"].append(plain(moe["load"][0].tolist(), 4))
    _append(self.train, values)

  def evaluated(self, n: int, measure: str, values: Sequence[float]) -> None:
    """Adds the measure of each seed at step `n` to the validation curves."""
    self.eval["step"].append(n)
    _append(self.eval, {measure: values})


def train(
  config, directory: pathlib.Path, seeds: int, together: bool, start: dict[str, Any]
) -> dict[str, Any] | None:
  """Trains until `train.steps`, until no seed is finite, or until a signal.

  Args:
    config: The config, whose `seed` is the list of the seeds.
    directory: The folder of the run.
    seeds: N, the number of seeds.
    together: Whether the seeds are vmapped. Otherwise they are trained one after another.
    start: Facts about the command, which results.json gets, too.

  Returns:
    The results, see `results`, or None after a signal.

  Raises:
    ConfigError: The command is wrong in one of the ways that `moe_jax.train` refuses, or the
      workdir has other seeds.
  """
  data_options = DataOptions.of(config.data)
  train_options = TrainOptions.of(config.train)
  tokenizer, sources = data.tokenizer_of(data_options), data.make_sources(data_options)
  size, fingerprints = data.vocab_size(data_options, tokenizer), data.fingerprints(sources)
  measure = evaluate.MEASURES[data_options.objective][0]
  workdir.check_data(directory, fingerprints, tokenizer.fingerprint)
  mesh = sharding.make_mesh({"data": 1})
  model = assembly.model(_of_one_seed(config), size, mesh)
  optimizer, schedule = optimizers.make(
    optimizers.OptimizerOptions.of(config.optimizer), train_options.steps
  )
  rows = train_options.microbatch
  one = functools.partial(update.make, config, optimizer=optimizer, schedule=schedule)
  step = jax.jit(over_seeds(one, model, seeds, together), donate_argnums=0)
  make = functools.partial(draw, model, optimizer, seeds, data_options.seq_len, rows)
  over = functools.partial(over_states, model, seeds, together)
  totals = evaluate.make_eval(
    data_options, rows, dict(config.sharding), model, mesh, tokenizer, sources, over
  )

  def evaluator(state, batches):
    return _summaries(totals(state, batches), seeds, measure)

  with contextlib.ExitStack() as stack:
    batches = stack.enter_context(
      contextlib.closing(
        data.train_iterator(data_options, tokenizer, sources, train_options.batch_size)
      )
    )
    workdir.claim(directory, config)
    stack.enter_context(workdir.exclusive(directory))
    checkpoints = stack.enter_context(
      Checkpoints(directory / "checkpoints", train_options.keep_last, train_options.keep_best)
    )
    record, seconds = Record.empty(seeds), 0.0
    if checkpoints.resumed_step(train_options.steps) is None:
      state = jax.jit(make)()
    else:
      place = sharding.replicated(mesh)
      restored = checkpoints.restore(
        jax.tree.map(
          lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
          jax.eval_shape(make),
        )
      )
      for sentence in restored.told:
        print(sentence, file=sys.stderr, flush=True)
      state, meta = restored.state, restored.meta
      batches.set_state(restored.data)
      record, seconds = Record(**meta["record"]), meta["seconds"]
    facts = {"data": fingerprints, "tokenizer": tokenizer.fingerprint}
    workdir.note_start(directory, config, facts, start | {"step": int(state.step), "seeds": seeds})
    interrupt = stack.enter_context(Interrupt())
    clock = time.monotonic() - seconds
    state = _steps(config, state, batches, step, evaluator, checkpoints, record, interrupt, clock)
    seconds = time.monotonic() - clock
    if interrupt.name:
      return None
  return results(
    config,
    record,
    evaluator(state, config.train.eval_batches),
    size,
    start
    | {
      "seeds": seeds,
      "steps": int(state.step),
      "tokens": int(state.step) * config.train.batch_size * config.data.seq_len,
      "wall_seconds": seconds,
      "data": fingerprints,
      "hardware": workdir.hardware(mesh),
    },
  )


def _of_one_seed(config):
  """Returns the config with seed 0 in place of the list of seeds, which no model takes."""
  single = config.copy_and_resolve_references()
  with single.ignore_type():
    single.seed = 0
  return single


def _steps(
  config, state, batches, step, evaluator, checkpoints, record, interrupt, clock
) -> TrainState:
  """Returns the state after the remaining steps, or after those before a signal."""
  t, measure = config.train, evaluate.MEASURES[config.data.objective][0]
  maps_every = max(t.log_every, math.ceil(t.steps / MAPS))
  unread, begun = [], None
  with tqdm(total=t.steps, initial=int(state.step), unit="step", mininterval=2) as bar:
    for n in range(int(state.step) + 1, t.steps + 1):

      def due(every, n=n):
        return n % every == 0 or n == t.steps

      state, metrics = step(state, next(batches))
      unread.append((n, metrics))
      bar.update()
      stop = bool(interrupt.name)
      if not stop and not any(map(due, (t.log_every, t.eval_every, t.checkpoint_every))):
        continue
      # This waits for the device.
      unread = [(m, jax.tree.map(np.asarray, metrics)) for m, metrics in unread]
      if begun:  # the first steps are mostly compilation
        record.times.append(
          [(now - then) / len(unread) for now, then in zip(_now(), begun, strict=True)]
        )
      record.steps(unread)
      if due(t.log_every):
        record.point(*unread[-1], maps_every)
      bar.set_postfix_str("loss " + " ".join(f"{loss:.3f}" for loss in unread[-1][1]["loss"]))
      if due(t.eval_every):
        record.evaluated(n, measure, _means(evaluator(state, t.eval_batches), measure))
      if due(t.checkpoint_every) or stop:
        # A seed that has diverged does not stop the others, and its weights are saved with theirs,
        # so that the state need not be finite.
        checkpoints.save(
          n,
          state,
          batches.get_state(),
          {"seconds": time.monotonic() - clock, "record": dataclasses.asdict(record)},
          require_finite=False,
        )
      if stop or all(record.diverged):
        break
      unread, begun = [], _now()
  return state


def _now() -> tuple[float, float]:
  """Returns the wall clock and the CPU time in seconds."""
  return time.monotonic(), time.process_time()


def results(
  config, record: Record, final: Sequence[dict[str, float]], vocab_size: int, facts: dict[str, Any]
) -> dict[str, Any]:
  """Returns the content of results.json: the facts, and the fields below.

    bits_per_byte (or nats_per_target), loss   source -> [N] at the end, on train.eval_batches
                                               batches or all of them
    mean_bits_per_byte (or ...)                [N]: their mean over the sources
    diverged, train, eval, load                see `Record`; load's "layers" are [Lm][T][E]
    step_seconds, step_cpu_seconds             of a step of one seed: medians over the run, without
                                               evaluations

  It also has the parameters, the FLOPs per token, the versions and the date. None stands for what
  is not finite.
  """
  measure = evaluate.MEASURES[config.data.objective][0]
  total, activated = accounts.parameter_counts(config, vocab_size)
  by_source = {
    name: {
      key.removeprefix(f"{name}/"): plain([seed[key] for seed in final])
      for key in final[0]
      if key.startswith(f"{name}/")
    }
    for name in (measure, "loss")
  }
  versions = workdir.versions()
  wall, cpu = (
    (statistics.median(column) / facts["seeds"] for column in zip(*record.times, strict=True))
    if (record.times)
    else (None, None)
  )
  load = record.load | {
    "layers": np.swapaxes(np.array(record.load["layers"]), 0, 1).tolist()
    if record.load["layers"]
    else []
  }
  return (
    facts
    | by_source
    | {
      f"mean_{measure}": plain(_means(final, measure)),
      "diverged": record.diverged,
      "train": record.train,
      "eval": record.eval,
      "load": load,
      "step_seconds": wall,
      "step_cpu_seconds": cpu,
      "parameters": {"total": total, "activated": activated},
      "flops_per_token": accounts.flops_per_token(config, vocab_size),
      "python": versions["python"],
      "versions": versions["packages"],
      "commit": versions["commit"],
      "date": datetime.date.today().isoformat(),
    }
  )


def _summaries(totals: evaluate.Totals, seeds: int, measure: str) -> list[dict[str, float]]:
  """Returns `evaluate.summary` for each seed.

  The totals have an axis of seeds, or are 0 if a source has no text.
  """

  def of(seed):
    return {
      source: {name: float(np.broadcast_to(values, seeds)[seed]) for name, values in total.items()}
      for source, total in totals.items()
    }

  return [evaluate.summary(of(seed), measure) for seed in range(seeds)]


def _means(summaries: Sequence[dict[str, float]], measure: str) -> list[float]:
  """Returns the measure of each seed, averaged over the sources."""
  return [
    statistics.fmean(value for name, value in seed.items() if name.startswith(f"{measure}/"))
    for seed in summaries
  ]


def _append(curves: dict[str, list], values: Mapping[str, Any]) -> None:
  """Adds a point to the curve of each seed."""
  for name, of_seeds in values.items():
    curves.setdefault(name, [[] for _ in of_seeds])
    points: Any = plain(np.asarray(of_seeds, np.float64).tolist())
    for curve, value in zip(curves[name], points, strict=True):
      curve.append(value)


def main(argv: Sequence[str]) -> int:
  """Does what the command line says and returns the exit code."""
  keep_memory()
  return guarded(argv, __doc__, lambda rest: _main(rest, argv))


def _main(rest: Sequence[str], argv: Sequence[str]) -> int:
  counts = [arg.partition("=")[2] for arg in rest if arg.startswith("--seeds=")]
  if len(counts) != 1 or not counts[0].isdecimal() or not 1 <= float(counts[0]) <= 1000:
    raise ConfigError(
      "seeds", ", ".join(counts), "must be given once, the number of seeds, as in --seeds=3"
    )
  seeds = int(counts[0])
  if one := [arg for arg in rest if arg.startswith("--config.seed")]:
    raise ConfigError(
      "seed",
      one[0].partition("=")[2],
      f"is not read here, where seeds 0 to {seeds - 1} are trained; leave it out",
    )
  command = parse([arg for arg in rest if arg != "--apart" and not arg.startswith("--seeds=")])
  config, directory = command.config, command.workdir
  assert directory is not None, "`parse` refuses a command without --workdir"
  assembly.validate(config, 1)
  if config.train.teacher.workdir:
    raise ConfigError(
      "train.teacher.workdir",
      config.train.teacher.workdir,
      "seeds that train together have no teacher; train each with python -m moe_jax train",
    )
  if config.data.dynamic.every:
    raise ConfigError(
      "data.dynamic.every",
      config.data.dynamic.every,
      "seeds that train together read the same batches, whose shares cannot follow the losses of "
      "each; must be 0, or train each with python -m moe_jax train",
    )
  with config.ignore_type():
    # The list makes this run a different one from runs of moe_jax.train, and of more seeds.
    config.seed = list(range(seeds))
  workdir.check(directory, config)
  from absl import logging as absl_logging

  absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax warns of things that are as they should be
  logging.getLogger("jax").setLevel(logging.WARNING)
  outcome = train(
    config,
    directory,
    seeds,
    "--apart" not in rest,
    {
      "config": command.path,
      "command": "python -m experiments.common.seeds " + shlex.join(argv[1:]),
    },
  )
  if outcome is None:
    print(f"stopped; saved in {directory}; the same command goes on from there", file=sys.stderr)
    return 0
  workdir.write_json(directory / "results.json", outcome)
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
