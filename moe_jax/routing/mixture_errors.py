"""Errors of a mixture of experts on a case: how the gate and the outputs are compared with the
target.

Jacobs, Jordan, Nowlan and Hinton, "Adaptive Mixtures of Local Experts" (Neural Computation 3,
1991), Eqs. 1.1 to 1.5. With p the gate's probabilities, o the experts' outputs and d the target,
the gradients with respect to o_i are:

    error        form                                         gradient
    cooperative  |d - sum_i p_i o_i|^2               Eq. 1.1  -2 p_i (d - sum_j p_j o_j)
    expected     sum_i p_i |d - o_i|^2               Eq. 1.2  -2 p_i (d - o_i)            Eq. 1.4
    competitive  -log sum_i p_i exp(-|d - o_i|^2/2)  Eq. 1.3  -h_i (d - o_i)              Eq. 1.5

The first couples the experts, the other two make each answer for itself. In the second a case moves
each expert by the prior p_i; in the third by the posterior h_i, so that the expert that already
does best learns fastest.

All arithmetic is float32; `*N` are any batch axes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def cooperative(
  gate: Float[Array, "*N E"], outputs: Float[Array, "*N E D"], target: Float[Array, "*N D"]
) -> Float[Array, "*N"]:
  """Squared error of the blend (Eq. 1.1). At least 0.

  Args:
    gate: p, probabilities of the experts.
    outputs: o, what each expert answers.
    target: d, what the answer should be.
  """
  gate, outputs, target = _float32(gate, outputs, target)
  blend = jnp.sum(gate[..., None] * outputs, axis=-2)
  return jnp.sum(jnp.square(target - blend), axis=-1)  # Eq. 1.1


def expected(
  gate: Float[Array, "*N E"], outputs: Float[Array, "*N E D"], target: Float[Array, "*N D"]
) -> Float[Array, "*N"]:
  """Mean squared error of one expert picked at random by the gate (Eq. 1.2). At least 0.

  For arguments see `cooperative`.
  """
  gate, outputs, target = _float32(gate, outputs, target)
  return jnp.sum(gate * _squared_distance(outputs, target), axis=-1)  # Eq. 1.2


def competitive(
  gate: Float[Array, "*N E"], outputs: Float[Array, "*N E D"], target: Float[Array, "*N D"]
) -> Float[Array, "*N"]:
  """Negative log likelihood of the target in a mixture of unit Gaussians about the outputs (Eq.
  1.3). At least 0.

  The likelihood's constant, D/2 log(2 pi), is left out, as in the paper. Finite as long as the
  squared distances are. A gate of exactly 0 gets a gradient of 0. For arguments see `cooperative`.
  """
  return -jax.nn.logsumexp(_log_joint(gate, outputs, target), axis=-1)  # Eq. 1.3


def posterior(
  gate: Float[Array, "*N E"], outputs: Float[Array, "*N E D"], target: Float[Array, "*N D"]
) -> Float[Array, "*N E"]:
  """h_i: how probable it is that expert i made the target (in Eq. 1.5). In [0, 1], sums to 1 over
  experts.

      h_i = p_i exp(-|d - o_i|^2/2) / sum_j p_j exp(-|d - o_j|^2/2)

  For arguments see `cooperative`.
  """
  return jax.nn.softmax(_log_joint(gate, outputs, target), axis=-1)


def _log_joint(gate, outputs, target):
  """log p_i - |d - o_i|^2/2; -inf, with zero gradient, where p_i is 0."""
  gate, outputs, target = _float32(gate, outputs, target)
  positive = gate > 0
  log_gate = jnp.where(positive, jnp.log(jnp.where(positive, gate, 1.0)), -jnp.inf)
  return log_gate - 0.5 * _squared_distance(outputs, target)


def _squared_distance(outputs, target):
  return jnp.sum(jnp.square(target[..., None, :] - outputs), axis=-1)


def _float32(*arrays):
  return tuple(array.astype(jnp.float32) for array in arrays)
