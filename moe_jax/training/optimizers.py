"""Optimizers, learning-rate schedules, and a function that makes both from their options."""

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
from moe_jax.options import (
  EXPERTS,
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
from moe_jax.training.anchor import toward_start
from moe_jax.training.muon import muon_for_matrices
from moe_jax.training.weight_paths import keys, stacked

# A schedule maps a step, counted from 0, to the learning rate.
Schedule = Callable[[Any], Any]


def cosine(peak: float, steps: int, warmup: int, *, final_fraction: float, **_) -> Schedule:
  """Returns a warm-up followed by half a cosine.

  The cosine falls from `peak` to `final_fraction * peak` at step `steps - 1`.
  """

  def rate(step):
    done = jnp.clip((step - warmup) / max(steps - 1 - warmup, 1), 0.0, 1.0)
    return peak * (final_fraction + (1 - final_fraction) * 0.5 * (1 + jnp.cos(math.pi * done)))

  return _warm(rate, peak, warmup)


def rsqrt(peak: float, steps: int, warmup: int, **_) -> Schedule:
  """Returns a warm-up followed by `peak * sqrt(warmup / (step + 1))`, whatever the run's length."""
  return _warm(flat_rsqrt(peak, steps, warmup), peak, warmup)


def wsd(
  peak: float, steps: int, warmup: int, *, final_fraction: float, decay_fraction: float, **_
) -> Schedule:
  """Returns the schedule warmup-stable-decay of MiniCPM.

  After the warm-up the learning rate is constant. In the last `decay_fraction` of the steps it
  falls linearly to `final_fraction * peak`. Deviation: MiniCPM decays exponentially; the linear
  decay follows Hägele et al. 2024.
  """
  length = max(round(steps * decay_fraction), 1)

  def rate(step):
    done = jnp.clip((step - (steps - 1 - length)) / length, 0.0, 1.0)
    return peak * (1 - (1 - final_fraction) * done)

  return _warm(rate, peak, warmup)


def flat_rsqrt(peak: float, steps: int, warmup: int, **_) -> Schedule:
  """Returns a schedule as `rsqrt`, but with `peak` during the warm-up instead of a rise to it.

  T5 uses it as 1/sqrt(max(step, 10,000)), whose peak is 0.01.
  """
  del steps
  return lambda step: (
    peak
    * jnp.sqrt(max(warmup, 1) / jnp.maximum(jnp.asarray(step, jnp.float32) + 1, max(warmup, 1)))
  )


def staircase(
  peak: float, steps: int, warmup: int, *, milestones: Sequence[float], milestone_factor: float, **_
) -> Schedule:
  """Returns a warm-up followed by steps down, as DeepSeek uses them.

  The learning rate is multiplied by `milestone_factor` at each of `milestones`, which are fractions
  of all steps.
  """

  def reached_milestones(step):
    return sum(jnp.asarray(step >= round(fraction * steps), jnp.float32) for fraction in milestones)

  return _warm(
    lambda step: peak * jnp.power(milestone_factor, reached_milestones(step)), peak, warmup
  )


def constant(peak: float, steps: int, warmup: int, **_) -> Schedule:
  """Returns a warm-up followed by the constant `peak`."""
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
  """Returns the schedule `rate` with a linear warm-up in place of its first steps.

  Step n of the warm-up uses `peak * (n + 1) / warmup`, so that no step has the learning rate 0.
  """

  def warmed(step):
    step = jnp.asarray(step, jnp.float32)
    return jnp.where(step < warmup, peak * (step + 1) / max(warmup, 1), rate(step))

  return warmed


# The endings of the names of vectors, which have no weight decay.
_UNDECAYED = ("scale", "bias", "threshold")


def decayed(params: PyTree) -> PyTree:
  """Returns for each leaf whether it has weight decay.

  Matrices have it. Scales, biases and thresholds do not, even where they are stacked over layers
  and thus have two axes.
  """

  def name(path):
    return str(getattr(path[-1], "key", path[-1]))

  return jax.tree_util.tree_map_with_path(
    lambda path, x: x.ndim >= 2 and not name(path).endswith(_UNDECAYED), params
  )


def adamw(schedule: Schedule, o: OptimizerOptions) -> optax.GradientTransformation:
  """Returns AdamW (Loshchilov and Hutter 2019, Alg. 2), with decay scaled by the learning rate."""
  return optax.adamw(
    schedule, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, mask=decayed
  )


def muon(schedule: Schedule, o: OptimizerOptions) -> optax.GradientTransformation:
  """Returns Muon (Moonlight, Liu et al. 2025, arXiv 2502.16982) for matrices, and AdamW otherwise.

  See `muon.matrix_axes` for what is a matrix, and `adamw` for the other weights. Weight decay and
  schedule are the same for both.
  """
  return muon_for_matrices(
    schedule,
    adamw(schedule, o),
    momentum=o.momentum,
    steps=o.newton_schulz_steps,
    rms=o.update_rms,
    weight_decay=o.weight_decay,
  )


def adafactor(schedule: Schedule, o: OptimizerOptions) -> optax.GradientTransformation:
  """Returns Adafactor (Shazeer and Stern 2018).

  It has factored second moments, no first moment, and steps relative to the RMS of the weights. The
  decay of the second moment is 1 - t^-0.8. An update whose RMS exceeds `o.update_clip` is scaled
  down to it. The options b1, b2 and eps are not read.

  Layers and experts whose weights are stacked each have an Adafactor of their own, as in T5X, whose
  factor rules call both axes BATCH. Second moments are factored, and the RMS of weights and updates
  computed, for each matrix separately.

  Deviation: Weight decay is decoupled and scaled by the learning rate, as in `adamw`.
  Deviation: Of attention's [D, H, P] the two longest dimensions are factored, as in
  Mesh-TensorFlow; T5X joins heads and P.
  """
  decay = [optax.add_decayed_weights(o.weight_decay, mask=decayed)] if o.weight_decay else []
  one = optax.chain(
    optax.scale_by_factored_rms(),
    optax.clip_by_block_rms(o.update_clip),
    optax.scale_by_param_block_rms(),
  )
  return optax.chain(_each_alone(one), *decay, optax.scale_by_learning_rate(schedule))


def _each_alone(one: optax.GradientTransformation) -> optax.GradientTransformation:
  """Applies the transformation `one` to the matrix of every layer and expert separately.

  The first of the states of `one` must be a `FactoredState`, and the others empty. The resulting
  state is a single `FactoredState` of trees, as that of optax's Adafactor. Therefore the path of
  each slot ends with the path of its weight, which `state.state_shardings` relies on.
  """

  def per_matrix(function: Callable, path: Any, leaf: Any, in_axes: Any = 0) -> Callable:
    for _ in range(stacked(keys(path), leaf.ndim)):
      function = jax.vmap(function, in_axes)
    return function

  def init(params: Any) -> optax.FactoredState:
    def factors_of(weight: Any) -> Any:
      state: Any = one.init(weight)
      return state[0]

    each = jax.tree_util.tree_map_with_path(
      lambda path, weight: per_matrix(factors_of, path, weight)(weight), params
    )
    return _slots(each)._replace(count=jnp.zeros((), jnp.int32))

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    def update_matrix(count, grad, row, col, v, param):
      empty = [optax.EmptyState()] * 2
      after: Any
      step, after = one.update(grad, (optax.FactoredState(count, row, col, v), *empty), param)
      return step, after[0]

    each = jax.tree_util.tree_map_with_path(
      # `count` is the same for all matrices; everything else is mapped over.
      lambda path, grad, *rest: per_matrix(update_matrix, path, grad, (None, 0, 0, 0, 0, 0))(
        state.count, grad, *rest
      ),
      updates,
      state.v_row,
      state.v_col,
      state.v,
      params,
    )

    def is_pair(leaf):
      return isinstance(leaf, tuple)

    steps, factors = (
      jax.tree.map(lambda leaf, i=i: leaf[i], each, is_leaf=is_pair) for i in range(2)
    )
    return steps, _slots(factors)._replace(count=state.count + 1)

  return optax.GradientTransformation(init, update)


def _slots(each: PyTree) -> optax.FactoredState:
  """Turns a tree of states into one state of trees."""

  def is_state(leaf):
    return isinstance(leaf, optax.FactoredState)

  return optax.FactoredState(
    *(jax.tree.map(lambda leaf, i=i: leaf[i], each, is_leaf=is_state) for i in range(4))
  )


OPTIMIZERS = {"adamw": adamw, "adafactor": adafactor, "muon": muon}
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
  b1: Annotated[float, PROBABILITY] = option(
    0.9, "Decay rate of the first moment (adamw, and muon where it is AdamW)."
  )
  b2: Annotated[float, PROBABILITY] = option(
    0.95, "Decay rate of the second moment (adamw, and muon where it is AdamW)."
  )
  eps: Annotated[float, POSITIVE] = option(
    1e-8, "Added to the root of the second moment (adamw, and muon where it is AdamW)."
  )
  momentum: Annotated[float, PROBABILITY] = option(
    0.95, "Decay rate of the first moment of matrices (muon)."
  )
  newton_schulz_steps: Annotated[
    int, Bounds(1, 100, "five suffice, and each costs three matmuls", whole=True)
  ] = option(5, "Steps that make the first moment of a matrix nearly orthogonal (muon).")
  update_rms: Annotated[float, POSITIVE] = option(
    0.2,
    "RMS of the update of a matrix before its learning rate (muon); that of AdamW is 0.2 to 0.4.",
  )
  weight_decay: Annotated[float, NOT_NEGATIVE] = option(
    0.1, "Weight decay of matrices; scales, biases and thresholds have none."
  )
  clip_norm: Annotated[float, NOT_NEGATIVE] = option(
    1.0, "Global norm to which gradients are clipped; 0 = no clipping."
  )
  freeze: Annotated[tuple[str, ...], Text("must be the name of a parameter, such as 'router'")] = (
    option((), "Names of parameters that do not train, such as ('router',).")
  )
  freeze_experts: Annotated[int, EXPERTS] = option(
    0,
    "The first so many experts of each layer do not train, nor do their columns of the router "
    "(Lifelong-MoE).",
  )
  anchor_weight: Annotated[float, NOT_NEGATIVE] = option(
    0.0,
    "Weight in the loss of the squared distance of all weights from those with which the run began "
    "(online L2, a baseline of Lifelong-MoE); 0 = none.",
  )


def validate(o: OptimizerOptions) -> None:
  """Raises ConfigError unless the milestones are ascending fractions between 0 and 1."""
  if not all(0 < m < 1 for m in o.milestones) or list(o.milestones) != sorted(o.milestones):
    raise ConfigError(
      "optimizer.milestones",
      o.milestones,
      "must be ascending fractions of all steps, each between 0 and 1",
    )


def make(o: OptimizerOptions, steps: int) -> tuple[optax.GradientTransformation, Schedule]:
  """Returns `(optimizer, schedule)` for `steps` steps.

  The optimizer clips gradients by their global norm. The parameters that `o.freeze` names do not
  count in that norm, and they never change, not even by weight decay. The gradient of
  `o.anchor_weight` is a part of the gradient that is clipped.
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
  anchor = [toward_start(o.anchor_weight)] if o.anchor_weight else []
  clip = [optax.clip_by_global_norm(o.clip_norm)] if o.clip_norm else []
  freeze: list[optax.GradientTransformation] = (
    [optax.masked(optax.set_to_zero(), functools.partial(frozen, names=o.freeze))]
    if o.freeze
    else []
  )
  if o.freeze_experts:
    freeze.append(optax.stateless(functools.partial(_without_experts, count=o.freeze_experts)))
  optimizer = choose("optimizer.name", o.name, OPTIMIZERS)(schedule, o)
  # The first `freeze` keeps frozen parameters out of the norm, the second one out of weight decay.
  return optax.chain(*freeze, *anchor, *clip, optimizer, *freeze), schedule


def check_free_experts(frozen_experts: int, num_experts: int) -> None:
  """Raises ConfigError if experts are frozen, and no other expert is left that trains.

  Args:
    frozen_experts: `optimizer.freeze_experts`.
    num_experts: The number of experts of a layer.
  """
  if frozen_experts and frozen_experts >= num_experts:
    raise ConfigError(
      "optimizer.freeze_experts",
      frozen_experts,
      f"must be below the number of experts, {num_experts}, or no expert would train",
    )


def _without_experts(updates: PyTree, params: PyTree, count: int) -> PyTree:
  """Returns the updates with 0 for the first `count` experts and their columns of the router."""

  def masked(path, leaf):
    names = keys(path)
    layers = int("repeats" in names)
    if stacked(names, leaf.ndim) > layers:
      axis = layers
    elif names[-1].startswith("router"):
      axis = leaf.ndim - 1
    else:
      return leaf
    is_free = jnp.arange(leaf.shape[axis]) >= count
    return leaf * jnp.expand_dims(is_free, [i for i in range(leaf.ndim) if i != axis])

  return jax.tree_util.tree_map_with_path(masked, updates)


def frozen(params: PyTree, names: Sequence[str]) -> PyTree:
  """Returns for each leaf whether one of `names` is in its path.

  Raises:
    ConfigError: If a name is in no path.
  """

  def parts(path):
    return {str(getattr(entry, "key", entry)) for entry in path}

  all_names = set().union(*(parts(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)))
  for name in names:
    choose("optimizer.freeze", name, sorted(all_names))
  return jax.tree_util.tree_map_with_path(lambda path, _: bool(parts(path) & set(names)), params)
