"""An anchor: weights are drawn back to those with which their run began.

This is the online L2 regularisation (Lin et al. 2022, arXiv 2205.02014) with which Lifelong-MoE
(Chen et al. 2023, arXiv 2305.12281) is compared. It is elastic weight consolidation (Kirkpatrick et
al. 2017, arXiv 1612.00796) without Fisher information: all weights count alike.
"""

from __future__ import annotations

import typing

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree


@typing.no_type_check
class AnchorState(typing.NamedTuple):
  """The state of `toward_start`.

  Attributes:
    start: The weights with which the run began, a tree like that of the parameters.
  """

  start: PyTree


def toward_start(weight: float) -> optax.GradientTransformation:
  """Returns a transformation that adds the gradient of `weight * |w - w_start|^2`.

  The square is summed over all parameters, also scales and biases, and w_start are the parameters
  for which `init` was called. They are a part of the optimizer's state, so that a run that goes on
  after an interruption keeps its anchor. The loss that a step reports is that without this term.

  Args:
    weight: The weight of the squared distance in the loss, not negative.
  """

  def init(params: PyTree) -> AnchorState:
    # Copies are made because a step gives the memory of all parameters away.
    return AnchorState(jax.tree.map(jnp.copy, params))

  def update(
    updates: PyTree, state: AnchorState, params: PyTree | None = None
  ) -> tuple[PyTree, AnchorState]:
    drawn = jax.tree.map(
      lambda gradient, now, start: gradient + 2 * weight * (now - start).astype(gradient.dtype),
      updates,
      params,
      state.start,
    )
    return drawn, state

  return optax.GradientTransformation(init, typing.cast(typing.Any, update))
