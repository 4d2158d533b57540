"""Evaluation of a trained model on text: perplexity and bits per byte."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import assembly, data, sharding
from moe_jax.data.options import DataOptions
from moe_jax.errors import ConfigError, choose
from moe_jax.run.load import LoadedRun, load_run
from moe_jax.training import evaluate as evaluation
from moe_jax.training.options import TrainOptions
from moe_jax.training.state import TrainState

SPLITS = ("held_out", "all")


def evaluate(
  run: str | os.PathLike | LoadedRun,
  sources: Sequence[str] = (),
  *,
  split: str = "",
  batches: int = 0,
  batch_size: int = 0,
  step: int | None = None,
  mesh: Mapping[str, int] | None = None,
) -> dict[str, dict[str, int | float]]:
  """Returns how well a trained model predicts text.

  The text is cut into rows of `data.seq_len` tokens, and tokens are routed as in evaluations of the
  training run: in its groups, and with the capacity factor of evaluation. The numbers for the
  held-out text of the run are therefore those of its results.json.

  Args:
    run: The --workdir of a run, or what `load_run` returned.
    sources: Sources as in `data.sources`, such as "text:books/*.txt". () means those of the run.
    split: "held_out" reads the documents that the run's config holds out, and "all" reads all. ""
      means "held_out" for sources of the run, which it has trained on, and "all" for others.
    batches: The largest number of batches of each source; 0 means all of its text.
    batch_size: The number of rows of a batch; 0 means that of a microbatch in training. It matters
      for routers whose groups span several rows.
    step: The step of the checkpoint. None means the newest one.
    mesh: The size of each axis of the mesh that is not 1. None means one device.

  Returns:
    For each source a dict with

      loss: The mean number of nats per target.
      perplexity: exp(loss).
      bits_per_byte: The bits of all targets per byte of text. NaN for span corruption, where only
        a part of the text is predicted.
      tokens: The number of targets.
      bytes: The number of bytes that they stand for.

  Raises:
    ConfigError: The run, a source or the mesh is wrong, or an option is out of range.
  """
  if split:
    choose("split", split, SPLITS)
  for name, value in (("batches", batches), ("batch_size", batch_size)):
    if value < 0:
      raise ConfigError(name, value, "must be at least 0")
  loaded = run if isinstance(run, LoadedRun) else load_run(run, step)
  options = DataOptions.of(loaded.config.data)
  tokenizer = data.tokenizer_of(options)
  opened = [open_source(name, options, split) for name in sources or options.sources]
  devices = sharding.make_mesh({"data": 1} | dict(mesh or {}))
  rules = dict(loaded.config.sharding)
  totals: dict[str, dict[str, Any]] = {}
  state = placed(loaded, devices)
  for source_options, source in opened:
    measure = evaluation.make_eval(
      source_options,
      batch_size or TrainOptions.of(loaded.config.train).microbatch,
      rules,
      loaded.model,
      devices,
      tokenizer,
      [source],
    )
    totals |= measure(state, batches)
  return {name: _measures(total, options.objective) for name, total in totals.items()}


def open_source(name: str, options: DataOptions, split: str) -> tuple[DataOptions, data.Source]:
  """Returns a source whose validation documents are those of a split, and its options.

  Args:
    name: The source as in `data.sources`.
    options: The options of the data of the run.
    split: "held_out", "all", or "" for "held_out" of a source of the run and "all" of others.
  """
  split = split or ("held_out" if name in options.sources else "all")
  if split == "all":
    options = dataclasses.replace(options, validation_fraction=1.0)
  options = dataclasses.replace(options, sources=(name,))
  (source,) = data.make_sources(options)
  return options, source


def placed(loaded: LoadedRun, mesh: jax.sharding.Mesh) -> TrainState:
  """Returns a state with the variables of the run on the mesh, and without an optimizer."""
  shapes = assembly.abstract_variables(loaded.config, assembly.vocab_size(loaded.config))
  with sharding.use_rules(dict(loaded.config.sharding)):
    variables = jax.device_put(loaded.variables, sharding.param_shardings(mesh, shapes))
  return TrainState(
    step=jnp.int32(0),
    params=variables["params"],
    opt_state=(),
    router_state=variables.get("router_state", {}),
    rng=jax.random.key(0),
  )


def _measures(total: Mapping[str, float], objective: str) -> dict[str, int | float]:
  """Returns the measures of a source from its sums."""
  loss = total["nats"] / total["tokens"] if total["tokens"] else math.nan
  whole_text = objective == "next_token" and total["bytes"]
  return {
    "loss": float(loss),
    # A loss above 700 nats would overflow.
    "perplexity": math.exp(loss) if loss < 700 else math.inf,
    "bits_per_byte": float(total["nats"] / (math.log(2) * total["bytes"]))
    if whole_text
    else math.nan,
    "tokens": int(total["tokens"]),
    "bytes": int(total["bytes"]),
  }
