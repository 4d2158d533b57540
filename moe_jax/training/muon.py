"""Muon, which takes steps along nearly orthogonal matrices.

Papers: Jordan et al. 2024 (kellerjordan.github.io/posts/muon), and Moonlight (Liu et al. 2025,
arXiv 2502.16982) for weight decay and the size of updates.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree
from optax.contrib import MuonDimensionNumbers, MuonState, scale_by_muon

from moe_jax.training.weight_paths import keys, stacked

# The matrices of layers by name, and how many axes of each are inputs. The other axes are outputs.
# Embeddings, the output projection, routers, norms and biases are not among them.
_INPUT_AXES = {
  # FFNs and experts.
  "up": 1,
  "gate": 1,
  "down": 1,
  # Attention, whose heads and their features are one axis of a matrix.
  "query": 1,
  "key": 1,
  "value": 1,
  "output": 2,
  # Latent attention.
  "latent": 1,
  "query_latent": 1,
  "key_rope": 1,
  # Sublayers of another width.
  "to_width": 1,
  "from_width": 1,
  # LSTMs, whose gates and their units are one axis of a matrix.
  "input": 1,
  "recurrent": 1,
  "projection": 1,
}


def matrix_axes(path: Sequence[str], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
  """Returns the axes of a weight that are the inputs, and those that are the outputs, of a matrix.

  The axes before them count layers and experts, each of which has a matrix of its own. None means
  that the weight is no matrix of a layer: an embedding, the output projection, a router, a norm or
  a bias.

  Args:
    path: The names along the path of the weight.
    rank: The number of all axes of the weight.
  """
  inputs, first = _INPUT_AXES.get(path[-1]), stacked(path, rank)
  if inputs is None or rank - first <= inputs:
    return None
  axes = tuple(range(first, rank))
  return axes[:inputs], axes[inputs:]


def rules(params: PyTree) -> PyTree:
  """Returns "muon" or "adamw" for each weight."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: "muon" if matrix_axes(keys(path), leaf.ndim) else "adamw", params
  )


def muon_for_matrices(
  schedule: Callable,
  rest: optax.GradientTransformation,
  *,
  momentum: float,
  steps: int,
  rms: float,
  weight_decay: float,
) -> optax.GradientTransformation:
  """Returns Muon for the matrices of layers, and `rest` for all other weights.

  With the first moment M of a matrix of n inputs and m outputs, and Nesterov's momentum, the update
  is

      learning rate * (rms * sqrt(max(n, m)) * orthogonal(M) + weight_decay * weight)

  where orthogonal(M) replaces the singular values of M by numbers near 1. `steps` steps of a
  Newton-Schulz iteration compute it. The root mean square of the first summand is `rms` for a
  square matrix of full rank.

  Each layer and each expert has a matrix of its own. The axes that count them are mapped over, so
  that they stay divided among the devices as they are.

  Args:
    schedule: Maps a step to the learning rate.
    rest: The optimizer of the weights that are no such matrices.
    momentum: Decay rate of the first moment.
    steps: Steps of the Newton-Schulz iteration.
    rms: See above; Moonlight has 0.2, with which learning rates of AdamW can be kept.
    weight_decay: Weight decay, which is scaled by the learning rate.
  """
  matrices = optax.chain(
    _orthogonal(momentum, steps),
    optax.stateless(functools.partial(_resized, rms=rms)),
    optax.add_decayed_weights(weight_decay),
    optax.scale_by_learning_rate(schedule),
  )
  return optax.partition({"muon": matrices, "adamw": rest}, rules)


def _orthogonal(momentum: float, steps: int) -> optax.GradientTransformation:
  """Returns optax's `scale_by_muon`, which is applied to the matrix of each layer and expert.

  The state is a single `MuonState` of a tree of moments. Therefore the path of each moment ends
  with the path of its weight, which `state.state_shardings` relies on.
  """

  def of_one(path: Any, leaf: Any) -> tuple[optax.GradientTransformation, int]:
    """Returns the transformation of one matrix of a weight, and how many axes count matrices."""
    names = keys(path)
    inputs, outputs = matrix_axes(names, leaf.ndim) or ((), ())
    counted = stacked(names, leaf.ndim)
    dimensions = MuonDimensionNumbers(
      tuple(axis - counted for axis in inputs), tuple(axis - counted for axis in outputs)
    )
    one = scale_by_muon(ns_steps=steps, beta=momentum, weight_dimension_numbers=dimensions)
    return one, counted

  def init(params: Any) -> MuonState:
    alone: Any = scale_by_muon(ns_steps=steps, beta=momentum).init(jnp.zeros((1, 1)))
    return alone._replace(mu=jax.tree.map(jnp.zeros_like, params))

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    del params

    def step(path, gradient, moment):
      one, counted = of_one(path, gradient)

      def alone(gradient, moment):
        after: Any
        direction, after = one.update(gradient, state._replace(mu=moment))
        return direction, after.mu

      for _ in range(counted):
        alone = jax.vmap(alone)
      return alone(gradient, moment)

    pairs = jax.tree_util.tree_map_with_path(step, updates, state.mu)

    def is_pair(leaf):
      return isinstance(leaf, tuple) and len(leaf) == 2

    directions, moments = (
      jax.tree.map(lambda pair, i=i: pair[i], pairs, is_leaf=is_pair) for i in range(2)
    )
    return directions, state._replace(mu=moments, count=state.count + 1)

  return optax.GradientTransformation(init, update)


def _resized(updates: PyTree, params: PyTree, rms: float) -> PyTree:
  """Returns the orthogonal matrices, each times rms * sqrt(max(inputs, outputs))."""
  del params

  def resized(path, leaf):
    sides = matrix_axes(keys(path), leaf.ndim) or ((), ())
    longest = max(math.prod(leaf.shape[axis] for axis in axes) for axes in sides)
    return rms * math.sqrt(longest) * leaf

  return jax.tree_util.tree_map_with_path(resized, updates)
