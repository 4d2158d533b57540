"""Bits per byte of a model on each source's validation text; where only a part of the text is
predicted, nats a target."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from moe_jax import data, sharding
from moe_jax.training.state import TrainState
from moe_jax.training.step import Batch, eval_step

Totals = dict[
  str, dict[str, float | np.ndarray]
]  # source -> nats, tokens, bytes; arrays: see `over` of `make_eval`

# By data.objective: what a run is judged by, and its unit in words. What span corruption masks is
# not all of the text, so that its nats are no length of a code for it.
MEASURES = {
  "next_token": ("bits_per_byte", "bits per byte"),
  "span_corruption": ("nats_per_target", "nats a target"),
}


def put(mesh: Mesh, batch: Batch) -> Batch:
  """This process's rows (see `sharding.reader`) as a part of the global batch, on the mesh."""
  place, (_, count) = sharding.batch_sharding(mesh), sharding.reader(mesh)

  def whole(rows):
    return (count * rows.shape[0], *rows.shape[1:])

  return {
    name: jax.make_array_from_process_local_data(place, rows, whole(rows))
    for name, rows in batch.items()
  }


def make_eval(
  config,
  model: nn.Module,
  mesh: Mesh,
  tokenizer: data.Tokenizer,
  sources: Sequence[data.Source],
  over: Callable[[Callable], Callable] = lambda step: step,
) -> Callable[..., Totals]:
  """`eval_fn(state, num_batches=0) -> Totals`; 0 batches = all of each source's validation text.

  `over` is put around `eval_step` before it is compiled, such as a vmap over states; totals get
  what axes that makes.
  """
  special = data.vocab_size(config.data, tokenizer) - tokenizer.size  # sentinels stand for no byte
  lengths = np.pad(np.asarray(tokenizer.byte_lengths, np.int32), (0, special))
  step = jax.jit(over(functools.partial(eval_step, model=model)))
  batch_size = config.train.batch_size // config.train.accumulate_steps

  def evaluate(state: TrainState, num_batches: int = 0) -> Totals:
    totals, (index, count) = {}, sharding.reader(mesh)
    with jax.set_mesh(mesh), sharding.use_rules(dict(config.sharding)):
      for source in sources:
        total = {"nats": 0.0, "tokens": 0.0, "bytes": 0.0}
        for batch in data.validation_batches(
          config.data,
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
  """`<measure>/<source>`, `loss/<source>` (mean nats a target), and `<measure>` of all the text
  together.

  Args:
    totals: of all sources.
    measure: "bits_per_byte" or "nats_per_target".
  """

  def mean(t):
    return t["nats"] / t["tokens"] if t["tokens"] else math.nan

  def bits(t):
    return t["nats"] / (math.log(2) * t["bytes"]) if t["bytes"] else math.nan

  of = {"bits_per_byte": bits, "nats_per_target": mean}[measure]
  result = {f"{measure}/{name}": of(t) for name, t in totals.items()}
  result |= {f"loss/{name}": mean(t) for name, t in totals.items()}
  return result | {
    measure: of({k: sum(t[k] for t in totals.values()) for k in ("nats", "tokens", "bytes")})
  }
