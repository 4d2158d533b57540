"""The first mixtures of local experts, and the back-propagation network they were compared with.

Paper: Jacobs, Jordan, Nowlan and Hinton, "Adaptive Mixtures of Local Experts" (Neural Computation
3, 1991), Sec. 3 and Fig. 1. Both networks take a vector and return (gate, outputs), the arguments
of `routing.mixture_errors` and `blend`. A bias is the weight of an additional last input that is
always 1. All arithmetic is float32. N is the number of cases, I of inputs, E of experts and C of
outputs.

The paper says that an expert has one linear decision surface, "where its output is 0.5", which
describes one logistic unit, and also that an expert gives a distribution over the four classes,
which describes a softmax over four units. Both are implemented here (see `distribution`). The
paper's statement that the networks it compares have about equal numbers of parameters holds only
for the logistic unit. With two inputs, the numbers are:

    parameters             4 experts  8 experts  6 hidden units  12 hidden units
    softmax of four units         60        120              46               88
    one logistic unit             24         48              25               49
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from moe_jax.layers.init import projection
from moe_jax.routing.adaptive_mixture import adaptive_mixture
from moe_jax.routing.plan import RoutingContext


class AdaptiveMixture(nn.Module):
  """Single-layer experts and a single-layer gate that see the same input (Fig. 1).

  Deviation: the paper does not say how the experts are initialised. Here their weights are
  truncated normal. The paper's gate begins unbiased, as the gate here does by default.

  Attributes:
    num_experts: Number of experts E.
    outputs: Number of outputs C of each expert; see `distribution`.
    init_scale: Scale of the experts' initial weights and biases, whose standard deviation is
      init_scale / sqrt(I + 1).
    gate_scale: Scale of the gate's initial weights and biases, likewise. 0 gives every expert the
      same share of every case.
  """

  num_experts: int
  outputs: int
  init_scale: float = 1.0
  gate_scale: float = 0.0

  @nn.compact
  def __call__(self, x: Float[Array, "N I"]) -> tuple[Float[Array, "N E"], Float[Array, "N E C"]]:
    """Returns the gate p, which sums to 1 over experts, and the experts' outputs o in [0, 1]."""
    x = _with_one(x)
    fan_in = x.shape[-1]
    logits = x @ projection(
      self,
      "router",
      (fan_in, self.num_experts),
      (None, "router"),
      fan_in=fan_in,
      scale=self.gate_scale,
    )
    # The plan lists the experts of the first case, then those of the second, and so on.
    gate = adaptive_mixture(logits, RoutingContext()).gate.reshape(logits.shape)
    weight = projection(
      self,
      "experts",
      (self.num_experts, fan_in, self.outputs),
      ("expert", None, None),
      fan_in=fan_in,
      scale=self.init_scale,
    )
    return gate, distribution(jnp.einsum("ni,eic->nec", x, weight))


class BackPropagation(nn.Module):
  """The paper's baseline with one hidden layer of logistic units.

  It has the interface of a mixture whose only expert gets every case.

  Attributes:
    hidden: Number of hidden units H.
    outputs: Number of outputs C; see `distribution`.
    init_scale: Scale of all initial weights and biases, whose standard deviation is init_scale /
      sqrt(fan-in).
  """

  hidden: int
  outputs: int
  init_scale: float = 1.0

  @nn.compact
  def __call__(self, x: Float[Array, "N I"]) -> tuple[Float[Array, "N 1"], Float[Array, "N 1 C"]]:
    """Returns a gate of ones, and the outputs of the network in [0, 1]."""
    for name, width in (("hidden", self.hidden), ("output", self.outputs)):
      x = _with_one(x if name == "hidden" else jax.nn.sigmoid(x))
      x = x @ projection(
        self, name, (x.shape[-1], width), (None, None), fan_in=x.shape[-1], scale=self.init_scale
      )
    return jnp.ones((x.shape[0], 1)), distribution(x)[:, None]


def distribution(logits: Float[Array, "*N C"]) -> Float[Array, "*N C"]:
  """Returns the probabilities of C classes by a softmax.

  If C is 1, it returns the probability of one of two classes by a logistic unit.
  """
  return jax.nn.sigmoid(logits) if logits.shape[-1] == 1 else jax.nn.softmax(logits, axis=-1)


def blend(gate: Float[Array, "*N E"], outputs: Float[Array, "*N E C"]) -> Float[Array, "*N C"]:
  """Returns sum_i p_i o_i, the mixture of the experts' distributions.

  The paper reads the answer of the whole network from this mixture.
  """
  return jnp.einsum("...e,...ec->...c", gate, outputs)


def _with_one(x: Float[Array, "N I"]) -> Float[Array, "N I+1"]:
  """Appends an input that is always 1, whose weight is the bias."""
  return jnp.concatenate([x.astype(jnp.float32), jnp.ones((x.shape[0], 1))], axis=-1)
