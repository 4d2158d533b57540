"""What tables of counts make of the study's targets, beside which its models have to be seen.

  python -m experiments st_moe_stability ngrams [--only=ROW]

Each table is fitted to the targets that a row reads in training, and scored on the held-out text
that its seeds are scored on: nats a target, averaged over the sources. A model that is no better
than a table has not learnt more than the table knows.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Float, Int

from experiments.st_moe_stability import rows
from moe_jax import data
from moe_jax.data.options import DataOptions
from moe_jax.errors import choose

# What each table knows of a target -> the fields of a batch that its contexts are made of. The
# input of a decoder is the target before.
CONTEXTS: Mapping[str, tuple[str, ...]] = {
  "unigram": (),
  "position": ("positions",),
  "bigram": ("inputs",),
}
Targets = list[Mapping[str, np.ndarray]]


def scores(row: str) -> dict[str, float]:
  """Returns the nats a target of each table, for a row of the desk scale."""
  config = rows.rows(rows.DESK)[row].read()
  options, train = DataOptions.of(config.data), config.train
  tokenizer, sources = data.tokenizer_of(options), data.make_sources(options)
  iterator = data.train_iterator(options, tokenizer, sources, train.batch_size)
  read = [next(iterator) for _ in range(train.steps)]
  iterator.close()
  rows_at_once = train.batch_size // train.accumulate_steps
  held_out = [
    list(data.validation_batches(options, tokenizer, each, rows_at_once, train.eval_batches))
    for each in sources
  ]
  size = data.vocab_size(options, tokenizer)
  return {
    name: statistics.fmean(nats(read, each, fields, size) for each in held_out)
    for name, fields in CONTEXTS.items()
  }


def nats(train: Targets, held_out: Targets, fields: Iterable[str], size: int) -> float:
  """Returns the mean nats of the held-out targets under a table of counts of `train`.

  The table is smoothed as in Witten and Bell (1991): with T different targets after a context h,
  p(w | h) = (c(h, w) + T(h) p(w)) / (c(h) + T(h)), where p(w) is the table without contexts,
  smoothed in the same way with the uniform distribution.

  Args:
    train: The batches that are counted.
    held_out: The batches that are scored.
    fields: The field of a batch that is the context, or none.
    size: The number of different targets.
  """
  seen, wanted = _flat(train, "targets"), _flat(held_out, "targets")
  everywhere = _smoothed(np.bincount(seen, minlength=size)[None], np.full(size, 1 / size))[0]
  probability = everywhere[wanted]
  for field in fields:
    context, asked = _flat(train, field), _flat(held_out, field)
    count = int(max(context.max(), asked.max())) + 1
    pairs = np.bincount(context * size + seen, minlength=count * size).reshape(count, size)
    probability = _smoothed(pairs, everywhere)[asked, wanted]
  return float(-np.log(probability).mean())


def _flat(batches: Targets, field: str) -> Int[np.ndarray, "N"]:
  """Returns a field of all real targets."""
  return np.concatenate([each[field][each["segment_ids"] > 0] for each in batches]).astype(np.int64)


def _smoothed(
  counts: Int[np.ndarray, "C V"], lower: Float[np.ndarray, "V"]
) -> Float[np.ndarray, "C V"]:
  """Returns p(w | h) of each context h; a context without counts has the lower distribution."""
  kinds = np.maximum((counts > 0).sum(axis=1, keepdims=True), 1)
  return (counts + kinds * lower) / (counts.sum(axis=1, keepdims=True) + kinds)


def flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of the verb."""
  parser.add_argument("--only", default=rows.BASELINE, help="the row; default: %(default)s")


def action(options: argparse.Namespace) -> int:
  """Prints the tables' scores.

  Raises:
    ConfigError: There is no such row.
  """
  choose("only", options.only, rows.rows(rows.DESK))
  found = scores(options.only)
  print("\n".join(f"{name:10}{value:.3f} nats a target" for name, value in found.items()))
  return 0
