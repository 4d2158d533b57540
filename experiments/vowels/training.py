"""Many runs of batch gradient descent at once, each of which stops where its squared error reaches
a criterion."""

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
    params: the final weights, with a leading axis R.
    epochs: weight updates until the criterion; max_epochs or less where it was not reached.
    reached: whether the criterion was reached.
    curve: squared error before each update, nan from where no run needs it any more.
  """

  params: Any
  epochs: Int[Array, "R"]
  reached: Bool[Array, "R"]
  curve: Float[Array, "T R"]


def begin(model: nn.Module, seeds: range, width: int) -> Any:
  """Initial weights of one run a seed, stacked."""
  keys = jnp.stack([jax.random.key(seed) for seed in seeds])
  return nn.unbox(jax.vmap(lambda key: model.init(key, jnp.zeros((1, width)))["params"])(keys))


def squared_error(
  gate: Float[Array, "N E"], outputs: Float[Array, "N E C"], target: Float[Array, "N C"]
) -> Float[Array, ""]:
  """The criterion's measure: of the blend, averaged over cases and outputs. At least 0."""
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
  """Trains R runs side by side, one update an epoch, no momentum; a run that has reached the
  criterion rests.

  Args:
    model: returns (gate, outputs).
    error: of `routing.mixture_errors`; descended is its mean over cases.
    x: inputs.
    target: what the outputs should be.
    params: initial weights, with a leading axis R.
    step_size: of each run.
    criterion: squared error at which a run stops.
    max_epochs: T - 1: when to give up. A run whose error is no longer finite is given up at once.
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
