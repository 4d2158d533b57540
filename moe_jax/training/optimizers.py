"""Optimizers and learning-rate schedules: two literal tables, and what binds them to
`config.optimizer`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from moe_jax.errors import ConfigError, choose
from moe_jax.experts import AXES as EXPERT_AXES

Schedule = Callable[[Any], Any]  # step (from 0) -> learning rate


def cosine(peak: float, steps: int, warmup: int, *, final_fraction: float, **_) -> Schedule:
  """After the warm-up half a cosine, from `peak` down to `final_fraction * peak` at step `steps -
  1`."""

  def rate(step):
    done = jnp.clip((step - warmup) / max(steps - 1 - warmup, 1), 0.0, 1.0)
    return peak * (final_fraction + (1 - final_fraction) * 0.5 * (1 + jnp.cos(math.pi * done)))

  return _warm(rate, peak, warmup)


def rsqrt(peak: float, steps: int, warmup: int, **_) -> Schedule:
  """After the warm-up `peak * sqrt(warmup / (step + 1))`; it does not know the run's length."""
  return _warm(flat_rsqrt(peak, steps, warmup), peak, warmup)


def wsd(
  peak: float, steps: int, warmup: int, *, final_fraction: float, decay_fraction: float, **_
) -> Schedule:
  """Warm-up, stable, decay (MiniCPM): constant until the last `decay_fraction` of the steps, then a
  straight line.

  Deviation: MiniCPM decays exponentially; the line follows Hägele et al. 2024.
  """
  length = max(round(steps * decay_fraction), 1)

  def rate(step):
    done = jnp.clip((step - (steps - 1 - length)) / length, 0.0, 1.0)
    return peak * (1 - (1 - final_fraction) * done)

  return _warm(rate, peak, warmup)


def flat_rsqrt(peak: float, steps: int, warmup: int, **_) -> Schedule:
  """As `rsqrt`, but `peak` from the first step on instead of a warm-up: T5's 1/sqrt(max(step,
  10,000)), peak 0.01."""
  del steps
  return lambda step: (
    peak
    * jnp.sqrt(max(warmup, 1) / jnp.maximum(jnp.asarray(step, jnp.float32) + 1, max(warmup, 1)))
  )


def staircase(
  peak: float, steps: int, warmup: int, *, milestones: Sequence[float], milestone_factor: float, **_
) -> Schedule:
  """After the warm-up `peak`, times `milestone_factor` from each of `milestones`, fractions of all
  steps (DeepSeek)."""

  def reached(step):
    return sum(jnp.asarray(step >= round(fraction * steps), jnp.float32) for fraction in milestones)

  return _warm(lambda step: peak * jnp.power(milestone_factor, reached(step)), peak, warmup)


def constant(peak: float, steps: int, warmup: int, **_) -> Schedule:
  """`peak` after the warm-up."""
  del steps
  return _warm(lambda step: jnp.full_like(jnp.asarray(step, jnp.float32), peak), peak, warmup)


SCHEDULES = {
  "cosine": cosine,
  "rsqrt": rsqrt,
  "flat_rsqrt": flat_rsqrt,
  "wsd": wsd,
  "steps": staircase,
  "constant": constant,
}


def _warm(rate: Schedule, peak: float, warmup: int) -> Schedule:
  """`rate` preceded by a straight line: step n of the warm-up uses `peak * (n + 1) / warmup`, so
  none is 0."""

  def warmed(step):
    step = jnp.asarray(step, jnp.float32)
    return jnp.where(step < warmup, peak * (step + 1) / max(warmup, 1), rate(step))

  return warmed


_UNDECAYED = ("scale", "bias", "threshold")  # how the names of vectors end


def decayed(params: PyTree) -> PyTree:
  """Which leaves weight decay touches: matrices, not scales, biases and thresholds, however they
  are stacked."""

  def name(path):
    return str(getattr(path[-1], "key", path[-1]))

  return jax.tree_util.tree_map_with_path(
    lambda path, x: x.ndim >= 2 and not name(path).endswith(_UNDECAYED), params
  )


def adamw(schedule: Schedule, o) -> optax.GradientTransformation:
  """AdamW (Loshchilov and Hutter 2019, Algorithm 2); the decay is scaled by the learning rate."""
  return optax.adamw(
    schedule, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, mask=decayed
  )


def adafactor(schedule: Schedule, o) -> optax.GradientTransformation:
  """Adafactor (Shazeer and Stern 2018): factored second moments, no first moment, steps relative to
  the weights' RMS.

  Layers and experts whose weights are stacked each have an Adafactor of their own, as in T5X, whose
  factor rules call both axes BATCH: the second moment is factored, and the RMS of weights and
  updates taken, a matrix at a time. Deviation: weight decay is decoupled and scaled by the learning
  rate, as in `adamw`; b1, b2 and eps are not read. Deviation: of attention's [D, H, P] the two
  longest dimensions are factored (Mesh-TensorFlow); T5X joins heads and P. The second moment's
  decay is 1 - t^-0.8, and an update whose RMS exceeds `o.update_clip` is scaled down to it.
  """
  decay = [optax.add_decayed_weights(o.weight_decay, mask=decayed)] if o.weight_decay else []
  one = optax.chain(
    optax.scale_by_factored_rms(),
    optax.clip_by_block_rms(o.update_clip),
    optax.scale_by_param_block_rms(),
  )
  return optax.chain(_each_alone(one), *decay, optax.scale_by_learning_rate(schedule))


def stacked(path: Sequence[str], rank: int) -> int:
  """How many leading axes of the weight at `path` count layers (of a scan) and experts; `rank` is
  of the whole."""
  layers = "repeats" in path
  return layers + (path[-1] in EXPERT_AXES and rank - layers == len(EXPERT_AXES[path[-1]]))


def _each_alone(one: optax.GradientTransformation) -> optax.GradientTransformation:
  """`one`, whose first state is a `FactoredState` and whose others are empty, on every layer and
  expert by itself.

  Its state has the shape that it has of whole trees, so that each slot's path ends with its
  weight's.
  """

  def alone(function, path, leaf, in_axes=0):
    for _ in range(stacked(keys(path), leaf.ndim)):
      function = jax.vmap(function, in_axes)
    return function

  def init(params):
    each = jax.tree_util.tree_map_with_path(
      lambda path, x: alone(lambda x: one.init(x)[0], path, x)(x), params
    )
    return _slots(each)._replace(count=jnp.zeros((), jnp.int32))

  def update(grads, state, params):
    def matrix(count, grad, row, col, v, param):
      empty = [optax.EmptyState()] * 2
      step, (factors, *_) = one.update(
        grad, (optax.FactoredState(count, row, col, v), *empty), param
      )
      return step, factors

    each = jax.tree_util.tree_map_with_path(
      lambda path, grad, *rest: alone(matrix, path, grad, (None, 0, 0, 0, 0, 0))(
        state.count, grad, *rest
      ),
      grads,
      state.v_row,
      state.v_col,
      state.v,
      params,
    )

    def pair(leaf):
      return isinstance(leaf, tuple)

    steps, factors = (jax.tree.map(lambda leaf, i=i: leaf[i], each, is_leaf=pair) for i in range(2))
    return steps, _slots(factors)._replace(count=state.count + 1)

  return optax.GradientTransformation(init, update)


def _slots(each: PyTree) -> optax.FactoredState:
  """A tree of states as one state of trees."""

  def state(leaf):
    return isinstance(leaf, optax.FactoredState)

  return optax.FactoredState(
    *(jax.tree.map(lambda leaf, i=i: leaf[i], each, is_leaf=state) for i in range(4))
  )


def keys(path) -> tuple[str, ...]:
  """The names along a path of `jax.tree_util`."""
  return tuple(
    str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry))))
    for entry in path
  )


OPTIMIZERS = {"adamw": adamw, "adafactor": adafactor}


def validate(o) -> None:
  """Refuses what `make` could not build. `o` is `config.optimizer`.

  Raises:
    ConfigError: an unknown name, or a number out of its range.
  """
  choose("optimizer.name", o.name, OPTIMIZERS)
  choose("optimizer.schedule", o.schedule, SCHEDULES)
  ranges = {
    "learning_rate": (o.learning_rate > 0, "a positive number, such as 1e-3"),
    "warmup_steps": (o.warmup_steps >= 0, "a number of steps, 0 or more"),
    "final_fraction": (0 <= o.final_fraction <= 1, "a fraction from 0 to 1"),
    "decay_fraction": (0 < o.decay_fraction <= 1, "a fraction above 0, up to 1"),
    "b1": (0 <= o.b1 < 1, "a number from 0 to below 1"),
    "b2": (0 <= o.b2 < 1, "a number from 0 to below 1"),
    "eps": (o.eps > 0, "a positive number, such as 1e-8"),
    "weight_decay": (o.weight_decay >= 0, "0 or more"),
    "milestones": (
      all(0 < m < 1 for m in o.milestones) and list(o.milestones) == sorted(o.milestones),
      "ascending fractions of all steps, each between 0 and 1",
    ),
    "milestone_factor": (o.milestone_factor > 0, "a positive factor, such as 0.316"),
    "update_clip": (o.update_clip > 0, "a positive RMS, such as 1.0"),
    "clip_norm": (o.clip_norm >= 0, "a positive global norm, or 0 for no clipping"),
  }
  for key, (good, remedy) in ranges.items():
    if not good:
      raise ConfigError(f"optimizer.{key}", o[key], f"must be {remedy}")


def make(o, steps: int) -> tuple[optax.GradientTransformation, Schedule]:
  """`(optimizer, schedule)` of `config.optimizer` for `steps` steps; gradients are clipped by their
  global norm.

  Parameters that `o.freeze` names have no part in that norm and never change, not by weight decay
  either.
  """
  validate(o)
  schedule = SCHEDULES[o.schedule](
    o.learning_rate,
    steps,
    o.warmup_steps,
    final_fraction=o.final_fraction,
    decay_fraction=o.decay_fraction,
    milestones=tuple(o.milestones),
    milestone_factor=o.milestone_factor,
  )
  clip = [optax.clip_by_global_norm(o.clip_norm)] if o.clip_norm else []
  still = (
    [optax.masked(optax.set_to_zero(), functools.partial(frozen, names=tuple(o.freeze)))]
    if o.freeze
    else []
  )
  return optax.chain(*still, *clip, OPTIMIZERS[o.name](schedule, o), *still), schedule


def frozen(params: PyTree, names: Sequence[str]) -> PyTree:
  """Which leaves have one of `names` anywhere in their path.

  Raises:
    ConfigError: a name is in no path.
  """

  def parts(path):
    return {str(getattr(entry, "key", entry)) for entry in path}

  known = set().union(*(parts(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)))
  for name in names:
    choose("optimizer.freeze", name, sorted(known))
  return jax.tree_util.tree_map_with_path(lambda path, _: bool(parts(path) & set(names)), params)
