"""Hash layers: the expert is a fixed function of the token's vocabulary id (Roller et al. 2021)."""

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
  """Each token goes to the expert that a fixed hash of its vocabulary id names; nothing is learned.

  Paper: Hash layers (Roller et al. 2021, arXiv 2106.04426) Sec. 3; the modulo is Expert Choice's
  (arXiv 2202.09368).

      y_t = E_{hash(id_t)}(x_t),  hash: vocabulary -> {0, ..., E - 1}

  "random": hash = mix(id, seed) mod E, with a 32-bit integer hash (`mix`), so that there is no
  table to store and any id has an expert; "modulo": hash = id mod E. How even the load is depends
  on how often each id occurs. Where there is a `context.salt`, the seed is mix(salt, seed): each
  layer of a model and each seed of a run has its own hash, which never changes during training.

  Reads `context.token_ids`, `context.salt` and `context.valid`. Of the logits, only the shape
  matters.

  Args:
    logits: of one group.
    context: padding takes no expert: `expert` E and gate 0.
    method: one of `METHODS`.
    seed: of "random", any integer; of no effect with "modulo".

  Returns:
    A plan of A = S assignments by position; the gate is 1, without gradient.

  Raises:
    ConfigError: unknown method.
    ValueError: the context has no token_ids.

  Deviation: of the paper's hashes, the balanced one (by frequency) and those of positions, bigrams
  and clusters are absent; its random table is drawn, not computed.
  """
  num_tokens, num_experts = logits.shape
  check_name("hash_layer", "method", method, METHODS)
  if context.token_ids is None:
    raise ValueError(
      "hash_layer needs RoutingContext.token_ids, the vocabulary ids of the tokens, which are None"
    )
  if method == "random":
    own = seed if context.salt is None else mix(context.salt, seed)
    hashed = mix(context.token_ids, own) % jnp.uint32(num_experts)
  else:
    hashed = context.token_ids % num_experts
  return token_choice(
    hashed.astype(jnp.int32)[:, None], jnp.ones((num_tokens, 1)), context, num_experts
  )


def mix(ids: Integer[Array, "*S"], seed: int | Integer[Array, ""]) -> UInt32[Array, "*S"]:
  """A pseudo-random 32-bit number for each (id, seed): MurmurHash3's finaliser of the id plus the
  finalised seed.

  Seeds that are equal modulo 2^32 are the same seed.
  """
  seed = jnp.uint32(seed % 2**32) if isinstance(seed, int) else seed.astype(jnp.uint32)
  offset = _finalise(seed + jnp.uint32(0x9E3779B9))
  return _finalise(ids.astype(jnp.uint32) + offset)


def _finalise(h: UInt32[Array, "*S"]) -> UInt32[Array, "*S"]:
  h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
  h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
  return h ^ (h >> 16)


# The token's own id decides.
ROUTER = Router(hash_layer, "no")
