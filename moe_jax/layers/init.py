"""How parameters are created, and with which values they begin.

- Projections start from a truncated normal of standard deviation 1/sqrt(fan_in), so that features
  of unit variance keep unit variance.
- Projections whose output is added to the residual stream (attention output, FFN output) start
  smaller by 1/sqrt(n), so that the sum of all n additions has unit variance (Radford et al. 2019).
  There are two additions per layer, or three per layer in the decoder of an encoder-decoder.
- The router starts as a projection times 0.1 (Switch, Sec. 2.4), so that routing begins near
  uniform.
- The embedding is described in `models/language_model.py` and `models/encoder_decoder.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

# A normal distribution cut off at two standard deviations keeps this share of its standard
# deviation.
_TRUNCATED_STD = 0.87962566103423978


def parameter(
  module: nn.Module,
  name: str,
  initializer: Callable[..., Array],
  shape: Sequence[int],
  axes: Sequence[str | None],
) -> Float[Array, "..."]:
  """Returns the float32 parameter `name` of `module`, after creating it if necessary.

  Args:
    module: The module that owns the parameter. The call must come from one of its compact methods.
    name: Name of the parameter within the module.
    initializer: Makes the initial value from (PRNG key, shape, dtype).
    shape: Shape of the parameter.
    axes: Logical name of each axis of `shape`, from which the sharding follows. None means that the
      axis is never sharded.
  """
  boxed = nn.with_logical_partitioning(initializer, tuple(axes))
  # The stub of `param` promises the box with the axis names, but the array itself comes out.
  return cast(Array, module.param(name, boxed, tuple(shape), jnp.float32))


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
  """Returns the weights `name` of `module`, which are stored in float32, cast to `dtype`.

  The initial values come from a normal distribution that is truncated at two standard deviations
  and then has a standard deviation of scale / sqrt(fan_in).

  Args:
    module: See `parameter`, also for `name`, `shape` and `axes`.
    name: Name of the parameter within the module.
    shape: Shape of the weights.
    axes: Logical name of each axis.
    fan_in: Number of input features of each output feature.
    scale: Factor on the initial standard deviation.
    dtype: Dtype of the returned array.
  """
  normal = nn.initializers.truncated_normal(scale * fan_in**-0.5 / _TRUNCATED_STD)
  return parameter(module, name, normal, shape, axes).astype(dtype)
