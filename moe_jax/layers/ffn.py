"""The dense feed-forward network, and the weights of E of them."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_jax.experts import AXES, FFN_BIASES, Experts, activate, add_bias, is_gated
from moe_jax.layers.aux import Aux, LayerContext
from moe_jax.layers.init import projection
from moe_jax.sharding import constrain


class DenseFfn(nn.Module):
  """act(x up) down, or act(x gate) * (x up) down for the gated activations (Shazeer 2020).

  It has the signature of `MoeLayer`, so that a block need not know which of the two it holds.

  Attributes:
    d_ff: F, hidden width.
    activation: a key of `ACTIVATIONS`.
    ffn_bias: a key of `FFN_BIASES`: what a vector does to the hidden units; the only bias there is.
    output_scale: factor on the initial output projection.
    dtype: of the activations; parameters are float32.
  """

  d_ff: int
  activation: str
  ffn_bias: str = "none"
  output_scale: float = 1.0
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "B L D"], context: LayerContext, routing: None = None
  ) -> tuple[Float[Array, "B L D"], Aux]:
    width = x.shape[-1]

    def into(name):
      return constrain(
        x
        @ projection(
          self, name, (width, self.d_ff), ("embed", "mlp"), fan_in=width, dtype=self.dtype
        ),
        "batch",
        "length",
        "act_mlp",
      )

    names = ("up", "gate") if is_gated(self.activation) else ("up",)
    hidden = activate(self.activation, {name: into(name) for name in names})
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
    return constrain(hidden @ down, "batch", "length", "act_embed"), Aux()


def experts(
  module: nn.Module,
  num_experts: int,
  width: int,
  d_ff: int,
  activation: str,
  ffn_bias: str,
  output_scale: float,
) -> Experts:
  """E FFNs of parameters up, gate [E, D, F], down [E, F, D] and hidden_bias [E, F] of `module`, as
  far as they exist.

  The other arguments are those of `DenseFfn`. Float32: they are cast to the dtype of the rows where
  they are used.
  """

  def into(name):
    return projection(module, name, (num_experts, width, d_ff), AXES[name], fan_in=width)

  down = projection(
    module, "down", (num_experts, d_ff, width), AXES["down"], fan_in=d_ff, scale=output_scale
  )
  return Experts(
    up=into("up"),
    down=down,
    gate=into("gate") if is_gated(activation) else None,
    activation=activation,
    hidden_bias=hidden_bias(module, ffn_bias, (num_experts, d_ff), AXES["hidden_bias"]),
    ffn_bias=ffn_bias,
  )


def hidden_bias(
  module: nn.Module, ffn_bias: str, shape: Sequence[int], axes: Sequence[str]
) -> Float[Array, "*E F"] | None:
  """Parameter `hidden_bias` of `module`, without effect at first; None for "none"."""
  if ffn_bias == "none":
    return None
  first = nn.initializers.constant(FFN_BIASES[ffn_bias][1])
  return module.param(
    "hidden_bias", nn.with_logical_partitioning(first, tuple(axes)), tuple(shape), jnp.float32
  )
