"""The dense feed-forward network (FFN), and the weights of E experts that are such networks."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_jax.experts import AXES, FFN_BIASES, Experts, activate, add_bias, is_gated
from moe_jax.layers.aux import Aux, LayerContext
from moe_jax.layers.init import parameter, projection
from moe_jax.sharding import constrain


class DenseFfn(nn.Module):
  """The dense FFN act(x up) down, or (act(x gate) * (x up)) down if gated (Shazeer 2020).

  It has the signature of `MoeLayer`, so that a block need not know which of the two it holds.

  Attributes:
    d_ff: Hidden width F.
    activation: A key of `ACTIVATIONS`.
    ffn_bias: A key of `FFN_BIASES`: what a vector does to the hidden units.
    biases: Whether each product with a matrix has an additive bias (LLaMA's `mlp_bias`).
    output_scale: Factor on the initial output projection.
    dtype: Dtype of the activations. Parameters are float32.
  """

  d_ff: int
  activation: str
  ffn_bias: str = "none"
  biases: bool = False
  output_scale: float = 1.0
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "B L D"], context: LayerContext, routing: None = None
  ) -> tuple[Float[Array, "B L D"], Aux]:
    """Returns the output of the FFN, and an empty Aux; `context` and `routing` are not used."""
    width = x.shape[-1]

    def biased(name, y, axis):
      if not self.biases:
        return y
      zeros = nn.initializers.zeros
      return y + parameter(self, f"{name}_bias", zeros, y.shape[-1:], (axis,)).astype(y.dtype)

    def to_hidden(name):
      y = x @ projection(
        self, name, (width, self.d_ff), ("embed", "mlp"), fan_in=width, dtype=self.dtype
      )
      return constrain(biased(name, y, "mlp"), "batch", "length", "act_mlp")

    names = ("up", "gate") if is_gated(self.activation) else ("up",)
    hidden = activate(self.activation, {name: to_hidden(name) for name in names})
    down = projection(
      self,
      "down",
      (self.d_ff, width),
      ("mlp", "embed"),
      fan_in=self.d_ff,
      scale=self.output_scale,
      dtype=self.dtype,
    )
    hidden = add_bias(
      self.ffn_bias, hidden, hidden_bias(self, self.ffn_bias, (self.d_ff,), ("mlp",))
    )
    y = biased("down", hidden @ down, "norm")
    return constrain(y, "batch", "length", "act_embed"), Aux()


def experts(
  module: nn.Module,
  num_experts: int,
  width: int,
  d_ff: int,
  activation: str,
  ffn_bias: str,
  output_scale: float,
  biases: bool = False,
) -> Experts:
  """Returns the weights of E expert FFNs, which are parameters of `module`.

  The parameters are `up` [E, D, F], `down` [E, F, D], `gate` [E, D, F] if the activation is gated,
  `hidden_bias` [E, F] if there is one, and with `biases` also `up_bias` [E, F], `down_bias` [E, D]
  and, if gated, `gate_bias` [E, F]. They are float32 and are cast to the dtype of the rows where
  they are used.

  Args:
    module: The module that owns the parameters.
    num_experts: Number of experts E.
    width: Model width D.
    d_ff: Hidden width F of one expert.
    activation: See `DenseFfn`.
    ffn_bias: See `DenseFfn`.
    output_scale: See `DenseFfn`.
    biases: Whether each product with a matrix has an additive bias of each expert (gpt-oss), which
      starts at 0.
  """

  def to_hidden(name):
    return projection(module, name, (num_experts, width, d_ff), AXES[name], fan_in=width)

  def added(name, size):
    if not biases:
      return None
    return parameter(module, name, nn.initializers.zeros, (num_experts, size), AXES[name])

  down = projection(
    module, "down", (num_experts, d_ff, width), AXES["down"], fan_in=d_ff, scale=output_scale
  )
  return Experts(
    up=to_hidden("up"),
    down=down,
    gate=to_hidden("gate") if is_gated(activation) else None,
    activation=activation,
    hidden_bias=hidden_bias(module, ffn_bias, (num_experts, d_ff), AXES["hidden_bias"]),
    ffn_bias=ffn_bias,
    up_bias=added("up_bias", d_ff),
    gate_bias=added("gate_bias", d_ff) if is_gated(activation) else None,
    down_bias=added("down_bias", width),
  )


def hidden_bias(
  module: nn.Module, ffn_bias: str, shape: Sequence[int], axes: Sequence[str]
) -> Float[Array, "*E F"] | None:
  """Returns the parameter `hidden_bias` of `module`, which has no effect at initialisation.

  Args:
    module: The module that owns the parameter.
    ffn_bias: A key of `FFN_BIASES`. For "none" there is no parameter, and the result is None.
    shape: Shape of the parameter.
    axes: Logical name of each axis.
  """
  if ffn_bias == "none":
    return None
  neutral = nn.initializers.constant(FFN_BIASES[ffn_bias][1])
  return parameter(module, "hidden_bias", neutral, shape, axes)
