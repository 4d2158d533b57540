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


def perturb(logits: Float[Array, "S E"], noise_std: Float[Array, "S E"] | float, key: Key[Array, ""] | None,
            train: bool) -> Float[Array, "S E"]:
  """H(x) = logits + noise_std * N(0, 1) (Shazeer 2017 Eq. 4) in float32; the logits themselves without key or training.

  The same key draws the same noise, so a loss that needs H(x) calls this again with what the router had. Noise of the
  first tokens does not depend on how many follow.
  """
  logits = logits.astype(jnp.float32)
  if key is None or not train:
    return logits
  return logits + noise_std * jax.random.normal(key, logits.shape, jnp.float32)
