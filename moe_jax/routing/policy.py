"""Whether a token keeps the experts after its best one: the policies of GShard, Mesh-TensorFlow and
ST-MoE."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_jax.routing.plan import RoutingContext


def _random(
  gate: Float[Array, "*shape"], threshold: float, context: RoutingContext
) -> Bool[Array, "*shape"]:
  """True with probability min(1, gate / threshold). Everywhere outside training or without a
  key."""
  if context.key is None or not context.train:
    return jnp.ones(gate.shape, bool)
  return jax.random.uniform(context.key, gate.shape, jnp.float32) < gate / threshold


def _threshold(
  gate: Float[Array, "*shape"], threshold: float, context: RoutingContext
) -> Bool[Array, "*shape"]:
  return gate > threshold


def _all(
  gate: Float[Array, "*shape"], threshold: float, context: RoutingContext
) -> Bool[Array, "*shape"]:
  return jnp.ones(gate.shape, bool)


# name -> f(gate, threshold, context) -> which are kept. `gate` without gradient, normalised over a
# token's choices.
POLICIES = {"random": _random, "threshold": _threshold, "all": _all}
