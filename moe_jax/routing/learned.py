"""Fields of RoutingContext that a router cannot do without."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.routing.plan import RoutingContext


def learned(router: str, context: RoutingContext, field: str) -> Float[Array, "..."]:
  """`context.field` in float32.

  Raises:
    ValueError: the field is None.
  """
  value = getattr(context, field)
  if value is None:
    raise ValueError(f"router {router} needs RoutingContext.{field}, which is None")
  return value.astype(jnp.float32)
