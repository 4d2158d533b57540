"""Hash layers, where a fixed hash of the vocabulary id is the expert (Roller et al. 2021)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, UInt32

from moe_jax.routing.options import Seed, check_name
from moe_jax.routing.plan import RoutingContext, RoutingPlan
from moe_jax.routing.router import Router
from moe_jax.routing.token_choice import token_choice

METHODS = ("random", "modulo")


def hash_layer(
  logits: Float[Array, "S E"], context: RoutingContext, *, method: str = "random", seed: Seed = 0
) -> RoutingPlan:
  """Routes each token to the expert that a fixed hash of its vocabulary id selects.

  Nothing is learned.

  Paper: Hash layers (Roller et al. 2021, arXiv 2106.04426) Sec. 3; the method "modulo" is that of
  Expert Choice (arXiv 2202.09368).

      y_t = E_{hash(id_t)}(x_t),  hash: vocabulary -> {0, ..., E - 1}

  The method "random" is hash = mix(id, seed) mod E with the 32-bit integer hash `mix`. It needs no
  table, and every id has an expert. The method "modulo" is hash = id mod E. The balance of the load
  depends on the frequencies of the ids. If the context has a salt, mix(salt, seed) replaces the
  seed: each layer of a model and each seed of a run then has its own hash, which never changes
  during training.

  Reads `context.token_ids`, `context.salt` and `context.valid`. Only the shape of the logits
  matters.

  Args:
    logits: Router outputs of one group.
    context: Padding gets `expert` E and gate 0.
    method: The hash function, one of `METHODS`.
    seed: The seed of the method "random", any integer. It has no effect on "modulo".

  Returns:
    A plan with A = S assignments in order of position. The gates are 1, without gradient.

  Raises:
    ConfigError: If the method is unknown.
    ValueError: If the context has no token_ids.

  Deviation: the paper's balanced hash (by frequency) and its hashes of positions, bigrams and
  clusters are not implemented. The paper draws a random table, whereas here the hash is computed.
  """
  num_tokens, num_experts = logits.shape
  check_name("hash_layer", "method", method, METHODS)
  if context.token_ids is None:
    raise ValueError(
      "hash_layer needs RoutingContext.token_ids, the vocabulary ids of the tokens, but it is None"
    )
  if method == "random":
    salted_seed = seed if context.salt is None else mix(context.salt, seed)
    hashed = mix(context.token_ids, salted_seed) % jnp.uint32(num_experts)
  else:
    hashed = context.token_ids % num_experts
  return token_choice(
    hashed.astype(jnp.int32)[:, None], jnp.ones((num_tokens, 1)), context, num_experts
  )


def mix(ids: Integer[Array, "*S"], seed: int | Integer[Array, ""]) -> UInt32[Array, "*S"]:
  """Returns a pseudo-random 32-bit number for each pair of id and seed.

  It is MurmurHash3's finaliser of the sum of the id and the finalised seed. Seeds that are equal
  modulo 2^32 are equivalent.
  """
  seed = jnp.uint32(seed % 2**32) if isinstance(seed, int) else seed.astype(jnp.uint32)
  # Without this constant, the finalised seed 0 would be 0.
  offset = _finalise(seed + jnp.uint32(0x9E3779B9))
  return _finalise(ids.astype(jnp.uint32) + offset)


def _finalise(h: UInt32[Array, "*S"]) -> UInt32[Array, "*S"]:
  """Returns the 32-bit finaliser of MurmurHash3."""
  h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
  h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
  return h ^ (h >> 16)


# The expert depends on the id of the token alone.
ROUTER = Router(hash_layer, "no")
