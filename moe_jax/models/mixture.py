"""Small mixtures of experts on a vector input, and the back-propagation network that they were
first compared with.

Jacobs, Jordan, Nowlan and Hinton, "Adaptive Mixtures of Local Experts" (Neural Computation 3,
1991), Sec. 3 and Fig. 1. Both networks return (gate, outputs), which is what
`routing.mixture_errors` and `blend` take. A bias is the weight of a last input that is always 1.
All arithmetic is float32; N is cases, I inputs, E experts, C outputs.

The paper gives an expert one linear decision surface, "where its output is 0.5", which is one
logistic unit, and also a distribution over the four classes, which is a softmax over four. Both are
here (see `distribution`). Its statement that the networks it compares have about equal numbers of
parameters holds of the logistic unit only; with two inputs:

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

  Deviation: the paper does not say how experts begin; ours are truncated normal. Its gate begins
  unbiased, as here.

  Attributes:
    num_experts: E.
    outputs: C, of each expert; see `distribution`.
    init_scale: of the experts' weights, biases included: their standard deviation is init_scale /
      sqrt(I + 1).
    gate_scale: the same for the gate; 0 gives every expert the same share of every case.
  """

  num_experts: int
  outputs: int
  init_scale: float = 1.0
  gate_scale: float = 0.0

  @nn.compact
  def __call__(self, x: Float[Array, "N I"]) -> tuple[Float[Array, "N E"], Float[Array, "N E C"]]:
    """p, which sums to 1 over experts, and o, what each expert answers. Both in [0, 1]."""
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
    gate = adaptive_mixture(logits, RoutingContext()).gate.reshape(
      logits.shape
    )  # the plan is ordered by case
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
  """One hidden layer of logistic units: the paper's baseline, as a mixture whose only expert gets
  every case.

  Attributes:
    hidden: H, units.
    outputs: C; see `distribution`.
    init_scale: of all weights, biases included: their standard deviation is init_scale /
      sqrt(fan-in).
  """

  hidden: int
  outputs: int
  init_scale: float = 1.0

  @nn.compact
  def __call__(self, x: Float[Array, "N I"]) -> tuple[Float[Array, "N 1"], Float[Array, "N 1 C"]]:
    """A gate of ones, and what the network answers, in [0, 1]."""
    for name, width in (("hidden", self.hidden), ("output", self.outputs)):
      x = _with_one(x if name == "hidden" else jax.nn.sigmoid(x))
      x = x @ projection(
        self, name, (x.shape[-1], width), (None, None), fan_in=x.shape[-1], scale=self.init_scale
      )
    return jnp.ones((x.shape[0], 1)), distribution(x)[:, None]


def distribution(logits: Float[Array, "*N C"]) -> Float[Array, "*N C"]:
  """Probabilities of C classes, which sum to 1; of one of two classes where C is 1: a logistic
  unit."""
  return jax.nn.sigmoid(logits) if logits.shape[-1] == 1 else jax.nn.softmax(logits, axis=-1)


def blend(gate: Float[Array, "*N E"], outputs: Float[Array, "*N E C"]) -> Float[Array, "*N C"]:
  """sum_i p_i o_i: the experts' distributions in the gate's proportions, from which the paper reads
  the answer."""
  return jnp.einsum("...e,...ec->...c", gate, outputs)


def _with_one(x: Float[Array, "N I"]) -> Float[Array, "N I+1"]:
  return jnp.concatenate([x.astype(jnp.float32), jnp.ones((x.shape[0], 1))], axis=-1)
