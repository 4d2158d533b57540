"""Batch gradient descent of many runs at once, each of which stops at a squared error."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from moe_jax.models.mixture import blend


class Runs(NamedTuple):
  """What R runs ended with.

  Attributes:
    params: The final weights, with a leading axis R.
    epochs: The number of weight updates until the criterion, or until the run was given up.
    reached: Whether the criterion was reached.
    curve: The squared error before each update. It is NaN after the last update of any run.
  """

  params: Any
  epochs: Int[Array, "R"]
  reached: Bool[Array, "R"]
  curve: Float[Array, "T R"]


def begin(model: nn.Module, seeds: range, width: int) -> Any:
  """Returns the initial weights of one run for each seed, stacked."""
  keys = jnp.stack([jax.random.key(seed) for seed in seeds])
  return nn.unbox(jax.vmap(lambda key: model.init(key, jnp.zeros((1, width)))["params"])(keys))


def squared_error(
  gate: Float[Array, "N E"], outputs: Float[Array, "N E C"], target: Float[Array, "N C"]
) -> Float[Array, ""]:
  """Returns the squared error of the blend, averaged over cases and outputs; at least 0."""
  return jnp.mean(jnp.square(target - blend(gate, outputs)))


@functools.partial(jax.jit, static_argnames=("model", "error", "max_epochs"))
def descend(
  model: nn.Module,
  error: Callable,
  x: Float[Array, "N I"],
  target: Float[Array, "N C"],
  params: Any,
  step_size: Float[Array, "R"],
  criterion: float,
  max_epochs: int,
) -> Runs:
  """Trains R runs side by side by gradient descent, with one update per epoch and no momentum.

  A run that has reached the criterion changes no more.

  Args:
    model: A network that returns (gate, outputs).
    error: A function of `routing.mixture_errors`, whose mean over cases is descended.
    x: The inputs.
    target: The targets of the outputs.
    params: The initial weights, with a leading axis R.
    step_size: The step size of each run.
    criterion: The squared error at which a run stops.
    max_epochs: T - 1, the number of epochs after which a run is given up. A run whose error is no
      longer finite is given up at once.
  """

  def measure(weights):
    gate, outputs = model.apply({"params": weights}, x)
    return jnp.mean(error(gate, outputs, target)), squared_error(gate, outputs, target)

  def epoch(state):
    at, runs, _ = state
    gradient, mse = jax.vmap(jax.grad(measure, has_aux=True))(runs.params)
    reached = runs.reached | (mse <= criterion)
    going = ~reached & jnp.isfinite(mse) & (at < max_epochs)

    def move(p, g):
      return p - jnp.where(going, step_size, 0.0).reshape(-1, *[1] * (p.ndim - 1)) * jnp.where(
        going.reshape(-1, *[1] * (p.ndim - 1)), g, 0.0
      )

    return (
      at + 1,
      Runs(
        jax.tree.map(move, runs.params, gradient),
        runs.epochs + going,
        reached,
        runs.curve.at[at].set(mse),
      ),
      jnp.any(going),
    )

  count = step_size.shape[0]
  start = Runs(
    params,
    jnp.zeros(count, jnp.int32),
    jnp.zeros(count, bool),
    jnp.full((max_epochs + 1, count), jnp.nan),
  )
  return jax.lax.while_loop(lambda state: state[2], epoch, (0, start, jnp.array(True)))[1]
