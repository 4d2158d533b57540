"""Optimizers and learning-rate schedules, and what makes an optimizer of its options."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from moe_jax.errors import ConfigError, choose
from moe_jax.experts import AXES as EXPERT_AXES
from moe_jax.options import (
  NOT_NEGATIVE,
  OPTIONAL_STEPS,
  POSITIVE,
  PROBABILITY,
  Bounds,
  OneOf,
  Options,
  Text,
  option,
)

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


def adamw(schedule: Schedule, o: OptimizerOptions) -> optax.GradientTransformation:
  """AdamW (Loshchilov and Hutter 2019, Algorithm 2); the decay is scaled by the learning rate."""
  return optax.adamw(
    schedule, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, mask=decayed
  )


def adafactor(schedule: Schedule, o: OptimizerOptions) -> optax.GradientTransformation:
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
_SHARE = Bounds(0, 1, "a share of the peak")


@dataclasses.dataclass(frozen=True)
class OptimizerOptions(Options):
  """The section `optimizer`."""

  name: Annotated[str, OneOf(OPTIMIZERS)] = option("adamw", "The optimizer.")
  learning_rate: Annotated[float, POSITIVE] = option(1e-3, "The peak of the schedule.")
  schedule: Annotated[str, OneOf(SCHEDULES)] = option(
    "cosine", "The learning rate after the warm-up; flat_rsqrt holds the peak during the warm-up."
  )
  warmup_steps: Annotated[int, OPTIONAL_STEPS] = option(
    100, "Steps over which the learning rate rises to its peak."
  )
  final_fraction: Annotated[float, _SHARE] = option(
    0.1, "The learning rate at the last step, as a fraction of the peak (cosine, wsd)."
  )
  decay_fraction: Annotated[float, Bounds(1e-9, 1, "a share of the steps")] = option(
    0.2, "Fraction of all steps over which the learning rate decays (wsd)."
  )
  milestones: Annotated[tuple[float, ...], POSITIVE] = option(
    (0.8, 0.9),
    "Ascending fractions of all steps, from each of which on the learning rate is multiplied by "
    "milestone_factor (steps).",
  )
  milestone_factor: Annotated[float, POSITIVE] = option(0.316, "See milestones.")
  update_clip: Annotated[float, POSITIVE] = option(
    1.0, "RMS that the update of a matrix may have before its learning rate (adafactor)."
  )
  b1: Annotated[float, PROBABILITY] = option(0.9, "Decay rate of the first moment (adamw).")
  b2: Annotated[float, PROBABILITY] = option(0.95, "Decay rate of the second moment (adamw).")
  eps: Annotated[float, POSITIVE] = option(1e-8, "Added to the root of the second moment (adamw).")
  weight_decay: Annotated[float, NOT_NEGATIVE] = option(
    0.1, "Weight decay of matrices; scales, biases and thresholds have none."
  )
  clip_norm: Annotated[float, NOT_NEGATIVE] = option(
    1.0, "Global norm to which gradients are clipped; 0 = no clipping."
  )
  freeze: Annotated[tuple[str, ...], Text("must be the name of a parameter, such as 'router'")] = (
    option((), "Names of parameters that do not train, such as ('router',).")
  )


def validate(o: OptimizerOptions) -> None:
  """Raises ConfigError if the milestones are no ascending fractions of the steps."""
  if not all(0 < m < 1 for m in o.milestones) or list(o.milestones) != sorted(o.milestones):
    raise ConfigError(
      "optimizer.milestones",
      o.milestones,
      "must be ascending fractions of all steps, each between 0 and 1",
    )


def make(o: OptimizerOptions, steps: int) -> tuple[optax.GradientTransformation, Schedule]:
  """Returns `(optimizer, schedule)` for `steps` steps; gradients are clipped by their global norm.

  Parameters that `o.freeze` names have no part in that norm and never change, not by weight decay
  either.
  """
  schedule = choose("optimizer.schedule", o.schedule, SCHEDULES)(
    o.learning_rate,
    steps,
    o.warmup_steps,
    final_fraction=o.final_fraction,
    decay_fraction=o.decay_fraction,
    milestones=o.milestones,
    milestone_factor=o.milestone_factor,
  )
  clip = [optax.clip_by_global_norm(o.clip_norm)] if o.clip_norm else []
  still = (
    [optax.masked(optax.set_to_zero(), functools.partial(frozen, names=o.freeze))]
    if o.freeze
    else []
  )
  return optax.chain(
    *still, *clip, choose("optimizer.name", o.name, OPTIMIZERS)(schedule, o), *still
  ), schedule


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
