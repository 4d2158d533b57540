"""The dense feed-forward network."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_jax.experts import activate, is_gated
from moe_jax.layers.aux import Aux, LayerContext
from moe_jax.layers.init import projection
from moe_jax.sharding import constrain


class DenseFfn(nn.Module):
  """act(x up) down, or act(x gate) * (x up) down for the gated activations (Shazeer 2020). No biases.

  It has the signature of `MoeLayer`, so that a block need not know which of the two it holds.
  """

  d_ff: int
  activation: str
  output_scale: float = 1.0
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "B L D"], context: LayerContext,
               routing: None = None) -> tuple[Float[Array, "B L D"], Aux]:
    width = x.shape[-1]
    into = lambda name: constrain(x @ projection(self, name, (width, self.d_ff), ("embed", "mlp"), fan_in=width,
                                                 dtype=self.dtype), "batch", "length", "act_mlp")
    names = ("up", "gate") if is_gated(self.activation) else ("up",)
    hidden = activate(self.activation, {name: into(name) for name in names})
    down = projection(self, "down", (self.d_ff, width), ("mlp", "embed"), fan_in=self.d_ff, scale=self.output_scale,
                      dtype=self.dtype)
    return constrain(hidden @ down, "batch", "length", "act_embed"), Aux()
