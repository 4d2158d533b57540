"""Error functions that compare the gates and outputs of a mixture of experts with a target.

Jacobs, Jordan, Nowlan and Hinton, "Adaptive Mixtures of Local Experts" (Neural Computation 3,
1991), Eqs. 1.1 to 1.5. With p the gate's probabilities, o the experts' outputs and d the target,
the gradients with respect to o_i are:

    error        form                                         gradient
    cooperative  |d - sum_i p_i o_i|^2               Eq. 1.1  -2 p_i (d - sum_j p_j o_j)
    expected     sum_i p_i |d - o_i|^2               Eq. 1.2  -2 p_i (d - o_i)            Eq. 1.4
    competitive  -log sum_i p_i exp(-|d - o_i|^2/2)  Eq. 1.3  -h_i (d - o_i)              Eq. 1.5

The first error couples the experts; the other two compare each expert with the target by itself.
The second weights the gradient of each expert by the prior p_i. The third weights it by the
posterior h_i, so that the expert that is already the best learns fastest.

All arithmetic is float32. `*N` are any batch axes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def cooperative(
  gate: Float[Array, "*N E"], outputs: Float[Array, "*N E D"], target: Float[Array, "*N D"]
) -> Float[Array, "*N"]:
  """Returns the squared error of the blend of all outputs (Eq. 1.1), which is at least 0.

  Args:
    gate: The probabilities of the experts, p.
    outputs: The outputs of the experts, o.
    target: The desired output, d.
  """
  gate, outputs, target = _float32(gate, outputs, target)
  blend = jnp.sum(gate[..., None] * outputs, axis=-2)
  return jnp.sum(jnp.square(target - blend), axis=-1)  # Eq. 1.1


def expected(
  gate: Float[Array, "*N E"], outputs: Float[Array, "*N E D"], target: Float[Array, "*N D"]
) -> Float[Array, "*N"]:
  """Returns the expected squared error of one expert that the gate picks at random (Eq. 1.2).

  It is at least 0. For the arguments see `cooperative`.
  """
  gate, outputs, target = _float32(gate, outputs, target)
  return jnp.sum(gate * _squared_distance(outputs, target), axis=-1)  # Eq. 1.2


def competitive(
  gate: Float[Array, "*N E"], outputs: Float[Array, "*N E D"], target: Float[Array, "*N D"]
) -> Float[Array, "*N"]:
  """Returns the negative log-likelihood of the target in a mixture of Gaussians (Eq. 1.3).

  The Gaussians have unit variance, and their means are the outputs of the experts. The constant
  D/2 log(2 pi) is left out, as in the paper, so that the result is at least 0. It is finite as long
  as the squared distances are. A gate of exactly 0 gets a gradient of 0. For the arguments see
  `cooperative`.
  """
  return -jax.nn.logsumexp(_log_joint(gate, outputs, target), axis=-1)  # Eq. 1.3


def posterior(
  gate: Float[Array, "*N E"], outputs: Float[Array, "*N E D"], target: Float[Array, "*N D"]
) -> Float[Array, "*N E"]:
  """Returns the posterior probability h_i that expert i generated the target (in Eq. 1.5).

      h_i = p_i exp(-|d - o_i|^2/2) / sum_j p_j exp(-|d - o_j|^2/2)

  It is in [0, 1] and sums to 1 over experts. For the arguments see `cooperative`.
  """
  return jax.nn.softmax(_log_joint(gate, outputs, target), axis=-1)


def _log_joint(gate, outputs, target):
  """Returns log p_i - |d - o_i|^2/2, which is -inf with zero gradient where p_i is 0."""
  gate, outputs, target = _float32(gate, outputs, target)
  positive = gate > 0
  # The inner `where` keeps log(0) out of the computation, whose gradient would be NaN even though
  # the outer `where` does not select it.
  log_gate = jnp.where(positive, jnp.log(jnp.where(positive, gate, 1.0)), -jnp.inf)
  return log_gate - 0.5 * _squared_distance(outputs, target)


def _squared_distance(outputs, target):
  """Returns |d - o_i|^2 of each expert."""
  return jnp.sum(jnp.square(target[..., None, :] - outputs), axis=-1)


def _float32(*arrays):
  """Casts all arrays to float32."""
  return tuple(array.astype(jnp.float32) for array in arrays)
