"""Access to the fields of RoutingContext that a router requires."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.routing.plan import RoutingContext


def learned(router: str, context: RoutingContext, field: str) -> Float[Array, "..."]:
  """Returns the field of `context` with the name `field` in float32.

  Args:
    router: The name of the router, for the error message.
    context: The context of the router.
    field: The name of a field of `RoutingContext` that holds floats.

  Raises:
    ValueError: If the field is None.
  """
  value = getattr(context, field)
  if value is None:
    raise ValueError(f"router {router} needs RoutingContext.{field}, which is None")
  return value.astype(jnp.float32)
