"""Brainformers (Zhou et al. 2023, arXiv 2306.00008), whose blocks list sublayers in any order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_jax.layers import Aux, LayerContext, LayerRouting
from moe_jax.layers.init import projection
from moe_jax.models.stack import Factory, make_block
from moe_jax.sharding import constrain

# Table 1 of the paper: the choices for each kind of sublayer. A block has 8 sublayers in any order.
# The paper's capacity factors are "1 to 4", of which the whole numbers are used here. Its gated
# ReLU and GELU are called reglu and geglu here.
SEARCH_SPACE: Mapping[str, Mapping[str, tuple[int | float | str, ...]]] = {
  "attention": {"width": (512, 768, 1024), "heads": (12, 16, 20)},
  "ffn": {
    "width": (512, 768, 1024),
    "hidden": (1536, 2048, 3072, 4096),
    "activation": ("reglu", "geglu", "relu", "gelu"),
  },
  "moe": {
    "width": (512, 768, 1024),
    "hidden": (1536, 2048, 3072, 4096),
    "activation": ("reglu", "geglu", "relu", "gelu"),
    "gate": ("top_2", "expert_choice"),
    "capacity": (1.0, 2.0, 3.0, 4.0),
  },
}
BLOCK_SUBLAYERS = 8


class Sublayer(nn.Module):
  """One pre-norm attention, dense FFN or MoE layer with a residual: x + dropout(layer(norm(x))).

  Parameters are named like those of the Transformer's `Block`: `attention_norm` and `attention`, or
  `ffn_norm` and `ffn`, which may have experts. If the sublayer's width W differs from the width D
  of the residual stream, there are also `to_width` and `from_width`.

  Deviation: the paper gives sublayers model dimensions of 512, 768 and 1024 and does not say how
  one feeds the next. Here the residual stream has one width, and matrices without bias lead into
  and out of a sublayer of another width.

  Attributes:
    layer: Makes the `Attention`, the `DenseFfn` or the `MoeLayer` of width W.
    attends: Whether `layer` makes an `Attention`.
    norm: Makes the normalisation of the residual stream.
    width: Width W of the sublayer.
    dropout: Probability of dropout on the sublayer's output.
    dtype: Dtype of the activations.
  """

  layer: Factory
  attends: bool
  norm: Factory
  width: int
  dropout: float = 0.0
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "B L D"], context: LayerContext, routing: LayerRouting | None = None
  ) -> tuple[Float[Array, "B L D"], Aux]:
    """Returns the residual stream after the sublayer, and what the sublayer reports."""
    name, stream = "attention" if self.attends else "ffn", x.shape[-1]
    y = self.norm(name=f"{name}_norm")(x)
    if self.width != stream:
      y = y @ projection(
        self, "to_width", (stream, self.width), ("embed", None), fan_in=stream, dtype=self.dtype
      )
    layer = self.layer(name=name)
    y, aux = (layer(y, context), Aux()) if self.attends else layer(y, context, routing)
    if self.width != stream:
      y = y @ projection(
        self,
        "from_width",
        (self.width, stream),
        (None, "embed"),
        fan_in=self.width,
        dtype=self.dtype,
      )
    y = nn.Dropout(self.dropout, deterministic=not context.train)(y)
    return constrain(x + y, "batch", "length", "act_embed"), aux


def sublayer_block(
  entry: str,
  scanned: bool,
  *,
  sublayers: Mapping[str, Mapping[str, Any]],
  norm: Factory,
  dropout: float = 0.0,
  dtype: DTypeLike = jnp.float32,
  remat: str = "none",
) -> Factory:
  """Returns a factory of a sublayer.

  Args:
    entry: A key of `sublayers`.
    scanned: Whether the sublayer is in the body of a scan.
    sublayers: Name -> the fields `layer`, `attends` and `width` of a `Sublayer`.
    norm: Makes a normalisation.
    dropout: Probability of dropout on the sublayer's output.
    dtype: Dtype of the activations.
    remat: A key of `REMAT`.
  """
  return make_block(
    Sublayer, remat, scanned, norm=norm, dropout=dropout, dtype=dtype, **sublayers[entry]
  )
