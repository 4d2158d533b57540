"""What makes routing random in training."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


def jitter(key: Key[Array, ""], x: Float[Array, "*S D"], epsilon: float) -> Float[Array, "*S D"]:
  """x times U[1 - epsilon, 1 + epsilon], elementwise, in float32 (Switch, appendix C: "input jitter").

  For the router's own copy of its input; experts see clean input. `epsilon` 0 returns x in float32.

  Deviation: ST-MoE's text applies it to the logits; this is the input, as in Switch and Mesh-TensorFlow.
  """
  return x.astype(jnp.float32) * jax.random.uniform(key, x.shape, jnp.float32, 1.0 - epsilon, 1.0 + epsilon)
