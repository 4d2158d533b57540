"""Evaluation of a model on the validation text of each source.

The measure is bits per byte. Where only a part of the text is predicted it is nats per target.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array

from moe_jax import data, sharding
from moe_jax.data.options import DataOptions
from moe_jax.training.state import TrainState
from moe_jax.training.step import Batch, eval_step

# Maps each source to its sums "nats", "tokens" and "bytes". They are floats, or arrays where
# `make_eval` got an `over` that adds axes.
Totals = dict[str, dict[str, Any]]

# For each value of data.objective, the measure by which a run is judged, and its unit in words.
# Span corruption predicts only the masked part of the text, so that its nats are not the length of
# a code for the text.
MEASURES = {
  "next_token": ("bits_per_byte", "bits per byte"),
  "span_corruption": ("nats_per_target", "nats per target"),
}


def put(mesh: Mesh, batch: Mapping[str, Array | np.ndarray]) -> Batch:
  """Returns the global batch on the mesh, of which `batch` holds this process's rows.

  See `sharding.reader` for which rows those are.
  """
  batch_sharding, (_, count) = sharding.batch_sharding(mesh), sharding.reader(mesh)

  def global_shape(rows):
    return (count * rows.shape[0], *rows.shape[1:])

  return {
    name: jax.make_array_from_process_local_data(batch_sharding, rows, global_shape(rows))
    for name, rows in batch.items()
  }


def make_eval(
  options: DataOptions,
  batch_size: int,
  rules: Mapping[str, Sequence[str]],
  model: nn.Module,
  mesh: Mesh,
  tokenizer: data.Tokenizer,
  sources: Sequence[data.Source],
  over: Callable[[Callable], Callable] = lambda step: step,
) -> Callable[..., Totals]:
  """Returns `eval_fn(state, num_batches=0) -> Totals`.

  With 0 batches the function reads all of each source's validation text.

  Args:
    options: The options of the data.
    batch_size: The number of rows of a batch, over all processes.
    rules: The section `sharding` of the config, for `sharding.use_rules`.
    model: The model, called as in `step.apply`.
    mesh: The mesh on which the states live.
    tokenizer: The tokenizer, whose byte lengths say how many bytes a token stands for.
    sources: The sources whose validation text is read.
    over: A transformation of `eval_step` that is applied before it is compiled, such as a vmap over
      states. The totals get the axes that it adds.
  """
  # Sentinels, which only span corruption has, stand for no byte.
  special = data.vocab_size(options, tokenizer) - tokenizer.size
  lengths = np.pad(np.asarray(tokenizer.byte_lengths, np.int32), (0, special))
  step = jax.jit(over(functools.partial(eval_step, model=model)))

  def evaluate(state: TrainState, num_batches: int = 0) -> Totals:
    totals, (index, count) = {}, sharding.reader(mesh)
    with jax.set_mesh(mesh), sharding.use_rules(rules):
      for source in sources:
        total = {"nats": 0.0, "tokens": 0.0, "bytes": 0.0}
        for batch in data.validation_batches(
          options,
          tokenizer,
          source,
          batch_size,
          num_batches,
          process_index=index,
          process_count=count,
        ):
          sums = step(state.params, state.router_state, put(mesh, batch), lengths)
          total = {name: total[name] + np.asarray(sums[name], np.float64) for name in total}
        totals[source.name] = total
    return totals

  return evaluate


def summary(totals: Totals, measure: str = "bits_per_byte") -> dict[str, float]:
  """Returns the measure and the loss of each source, and the measure of all the text together.

  Args:
    totals: The totals of all sources.
    measure: "bits_per_byte" or "nats_per_target".

  Returns:
    A dict with the keys `<measure>/<source>`, `loss/<source>` (mean nats per target) and
    `<measure>`. A value is NaN if nothing was evaluated.
  """

  def mean(t):
    return t["nats"] / t["tokens"] if t["tokens"] else math.nan

  def bits(t):
    return t["nats"] / (math.log(2) * t["bytes"]) if t["bytes"] else math.nan

  score = {"bits_per_byte": bits, "nats_per_target": mean}[measure]
  result = {f"{measure}/{name}": score(t) for name, t in totals.items()}
  result |= {f"loss/{name}": mean(t) for name, t in totals.items()}
  return result | {
    measure: score({k: sum(t[k] for t in totals.values()) for k in ("nats", "tokens", "bytes")})
  }
