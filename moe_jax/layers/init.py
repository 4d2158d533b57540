"""How weights begin.

- Projections: truncated normal of standard deviation 1/sqrt(fan_in), so that unit-variance features
  stay so.
- Projections that add to the residual stream (attention output, FFN output) times 1/sqrt(n), so
  that the sum of all n additions (two a layer, three in the decoder of an encoder-decoder) has unit
  variance (Radford et al. 2019).
- The router: as a projection times 0.1 (Switch, Sec. 2.4), so that routing begins near uniform.
- The embedding: see `models/decoder.py` and `models/encoder_decoder.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def projection(
  module: nn.Module,
  name: str,
  shape: Sequence[int],
  axes: Sequence[str | None],
  *,
  fan_in: int,
  scale: float = 1.0,
  dtype: DTypeLike = jnp.float32,
) -> Float[Array, "..."]:
  """Parameter `name` of `module`: float32, truncated normal of std scale / sqrt(fan_in), returned
  in `dtype`."""
  # A normal cut at two standard deviations keeps this share of its standard deviation.
  normal = nn.initializers.truncated_normal(scale * fan_in**-0.5 / 0.87962566103423978)
  weight = module.param(
    name, nn.with_logical_partitioning(normal, tuple(axes)), tuple(shape), jnp.float32
  )
  return weight.astype(dtype)
