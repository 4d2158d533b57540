"""Breaks parts of a training process: each function breaks one, in the process that calls it."""

from __future__ import annotations

import math
import pathlib

AT = 12  # the step at which a run of twenty steps is broken
LATE = 200  # the step at which a run of three hundred steps is broken


def scores_are_nan() -> None:
  """Makes the validation score NaN from step `AT` on."""
  from moe_jax.training import evaluate

  real, calls = evaluate.summary, []

  def summary(totals, measure="bits_per_byte"):
    calls.append(1)
    result = real(totals, measure)
    return {name: math.nan for name in result} if len(calls) > AT // 5 else result

  evaluate.summary = summary


def gradient_is_nan(at: int = AT) -> None:
  """Makes one number of the gradient of expert 1's matrix NaN in step `at`."""
  import jax
  import jax.numpy as jnp

  from moe_jax.run import update
  from moe_jax.training import step

  accumulate, train_step = step.accumulate, update.train_step

  def poisoned(state, batch, **options):
    def broken(*arguments):
      grads, *rest = accumulate(*arguments)

      def poison(path, leaf):
        if not jax.tree_util.keystr(path, simple=True, separator="/").endswith("layer_1/ffn/up"):
          return leaf
        return leaf.at[..., 1, 0, 0].set(
          jnp.where(state.step == at - 1, jnp.nan, leaf[..., 1, 0, 0])
        )

      return jax.tree_util.tree_map_with_path(poison, grads), *rest

    step.accumulate = broken
    return train_step(state, batch, **options)

  update.train_step = poisoned


def late_gradient_is_nan() -> None:
  """Makes a number of a gradient NaN in step `LATE`."""
  gradient_is_nan(LATE)


def update_ruins_weights() -> None:
  """Makes the update of step 15 infinite, though loss and gradient are finite.

  A checkpoint is due after that step.
  """
  import jax
  import jax.numpy as jnp
  import optax

  from moe_jax.training import optimizers

  make = optimizers.make

  def broken(*arguments):
    optimizer, schedule = make(*arguments)

    def update(updates, state, params):
      count, inner = state
      updates, inner = optimizer.update(updates, inner, params)
      return jax.tree.map(lambda u: jnp.where(count == 14, jnp.inf, u), updates), (count + 1, inner)

    return optax.GradientTransformation(
      lambda params: (jnp.zeros((), jnp.int32), optimizer.init(params)), update
    ), schedule

  optimizers.make = broken


def batches_are_garbage() -> None:
  """Makes the targets of four batches from `LATE` on random."""
  import numpy as np

  from moe_jax import data

  real = data.train_iterator

  class Garbage:
    """An iterator that passes on everything except those targets."""

    def __init__(self, iterator):
      self._iterator = iterator

    def __next__(self):
      batch, number = next(self._iterator), data.batches_of(self._iterator.get_state())
      if LATE <= number < LATE + 4:
        batch = batch | {
          "targets": np.random.default_rng(number).integers(
            0, 256, batch["targets"].shape, np.int32
          )
        }
      return batch

    def __getattr__(self, name):
      return getattr(self._iterator, name)

  data.train_iterator = lambda *arguments, **options: Garbage(real(*arguments, **options))


def batches_are_absent() -> None:
  """Leaves out the batches that a run with `batches_are_garbage` skips, without any poison.

  The guard goes back from step LATE + 1 to step 150 and skips the 51 batches since. The next two
  are poisoned, too, so that it goes back again and skips them.
  """
  from moe_jax import data

  real = data.train_iterator

  class Absent:
    """An iterator that leaves them out."""

    def __init__(self, iterator):
      self._iterator, self._read = iterator, 0

    def __next__(self):
      if self._read == 150:
        for _ in range(53):
          next(self._iterator)
      self._read += 1
      return next(self._iterator)

    def __getattr__(self, name):
      return getattr(self._iterator, name)

  data.train_iterator = lambda *arguments, **options: Absent(real(*arguments, **options))


def corpus_vanishes() -> None:
  """Deletes the files of the first source, `text:FOLDER/*.txt`, after some batches were read."""
  from moe_jax import data

  real = data.train_iterator

  class Vanishing:
    """An iterator that deletes the files that it reads from."""

    def __init__(self, iterator, folder):
      self._iterator, self._folder = iterator, folder

    def __next__(self):
      if data.batches_of(self._iterator.get_state()) == AT:
        for path in self._folder.iterdir():
          path.unlink()
      return next(self._iterator)

    def __getattr__(self, name):
      return getattr(self._iterator, name)

  def train_iterator(settings, *arguments, **options):
    folder = pathlib.Path(settings.sources[0].removeprefix("text:")).parent
    return Vanishing(real(settings, *arguments, **options), folder)

  data.train_iterator = train_iterator
