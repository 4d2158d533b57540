"""Policies for keeping a token's choices after the first (GShard, Mesh-TensorFlow, ST-MoE)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_jax.routing.plan import RoutingContext


def _random(
  gate: Float[Array, "*shape"], threshold: float, context: RoutingContext
) -> Bool[Array, "*shape"]:
  """Keeps a choice with probability min(1, gate / threshold).

  Outside training, or without a key, it keeps all choices.
  """
  if context.key is None or not context.train:
    return jnp.ones(gate.shape, bool)
  return jax.random.uniform(context.key, gate.shape, jnp.float32) < gate / threshold


def _threshold(
  gate: Float[Array, "*shape"], threshold: float, context: RoutingContext
) -> Bool[Array, "*shape"]:
  """Keeps the choices whose gate exceeds the threshold."""
  return gate > threshold


def _all(
  gate: Float[Array, "*shape"], threshold: float, context: RoutingContext
) -> Bool[Array, "*shape"]:
  """Keeps all choices."""
  return jnp.ones(gate.shape, bool)


# Each policy is a function f(gate, threshold, context) that returns True for the choices that are
# kept. `gate` has no gradient and is normalised over the choices of a token.
POLICIES = {"random": _random, "threshold": _threshold, "all": _all}
