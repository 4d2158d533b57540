"""Experts by a fixed hash of the vocabulary id, with learned gates (DeepSeek-V4's first layers)."""

from __future__ import annotations

from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.options import OneOf
from moe_jax.routing.hash_layer import mix
from moe_jax.routing.options import Count, NotNegative, Seed, check_k, check_name
from moe_jax.routing.plan import RoutingContext, RoutingPlan
from moe_jax.routing.router import Leak, Router
from moe_jax.routing.scored_top_k import GATE_NORMS, SCORES, gates
from moe_jax.routing.token_choice import leak, token_choice


def hash_top_k(
  logits: Float[Array, "S E"],
  context: RoutingContext,
  *,
  k: Count = 2,
  score: Annotated[str, OneOf(SCORES)] = "sqrt_softplus",
  gate_norm: Annotated[str, OneOf(GATE_NORMS)] = "top_k",
  norm_eps: NotNegative = 1e-20,
  seed: Seed = 0,
) -> RoutingPlan:
  """Routes each token to K experts that its vocabulary id selects, with gates from the logits.

  Paper: DeepSeek-V4, whose first three layers take experts so; hash layers of Roller et al. (2021,
  arXiv 2106.04426) have one expert and no gates.

      T = TopK(u_1(id), ..., u_E(id)),  u_i: vocabulary -> {0, ..., 2^32 - 1}
      s = score(logits),  g_i = s_i / (sum_{j in T} s_j + eps),  y = sum_{i in T} g_i(x) E_i(x)

  The pseudo-random numbers u_i of an id never change in training. They depend on the seed and, if
  the context has a salt, on it, so that layers and seeds of a run differ; see `hash_layer`. Only
  the gates are learned.

  Reads `context.token_ids`, `context.salt` and `context.valid`.

  Args:
    logits: Router outputs of one group. They are cast to float32.
    context: Padding gets `expert` E and gate 0.
    k: The number of experts per token, K, in [1, E].
    score: The definition of s; see `scored_top_k`.
    gate_norm: The definition of g. "top_k": as in the equations above. "none": s_i.
    norm_eps: eps. The released code has 1e-20.
    seed: An integer, on which u depends.

  Returns:
    A plan with A = K*S assignments, first choices first, and gates >= 0.

  Raises:
    ConfigError: If k is outside [1, E], or an option names nothing that is known.
    ValueError: If the context has no token_ids.

  Deviation: the released model looks experts up in a table that comes with its weights. How the
  table was made is not known to us; here the experts are computed, and all ids count alike.
  """
  name, num_experts = "hash_top_k", logits.shape[-1]
  check_k(name, k, num_experts)
  check_name(name, "score", score, SCORES)
  check_name(name, "gate_norm", gate_norm, GATE_NORMS)
  if context.token_ids is None:
    raise ValueError(
      f"{name} needs RoutingContext.token_ids, the vocabulary ids of the tokens, but it is None"
    )
  salted_seed = seed if context.salt is None else mix(context.salt, seed)
  by_expert = jax.vmap(mix, in_axes=(None, 0), out_axes=-1)
  numbers = by_expert(mix(context.token_ids, salted_seed), jnp.arange(num_experts))  # [S, E]
  # Signed numbers have the same order as these, because flipping the highest bit shifts them.
  expert = jax.lax.top_k((numbers ^ jnp.uint32(2**31)).astype(jnp.int32), k)[1]
  gate = gates(SCORES[score], logits.astype(jnp.float32), expert, gate_norm, norm_eps)
  return token_choice(expert, gate, context, num_experts)


def _leak(k: int) -> Leak:
  """Returns the `Leak` of the router.

  The experts depend on the id of the token alone, but first choices of later tokens are served
  before second choices of earlier ones where slots run out.
  """
  return leak(k, "choice")


ROUTER = Router(hash_top_k, _leak)
