"""A control for every router: experts at random."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from moe_jax.routing.options import Count, Seed, check_k
from moe_jax.routing.plan import RoutingContext, RoutingPlan
from moe_jax.routing.router import Router
from moe_jax.routing.token_choice import token_choice


def random_choice(
  logits: Float[Array, "S E"], context: RoutingContext, *, k: Count = 1, seed: Seed = 0
) -> RoutingPlan:
  """Each token gets K different experts, uniformly at random, whatever the logits: what a learned
  router must beat.

  Paper: no equation of a paper; the experts of THOR (arXiv 2110.04260) are chosen so.

      u_e ~ U[0, 1) for each expert e,  T = TopK(u),  y = 1/K sum_{i in T} E_i(x)

  In training u is drawn from `context.key`, each step anew. Outside training, or without a key, it
  is drawn from `seed`, `context.salt` and `context.group`, as far as they are given: the same
  numbers in each call, so that evaluation is deterministic, but others in each layer, each group
  and each run's seed. What a token gets does not depend on how many follow it. Equal numbers go to
  the lower expert.

  Reads `context.key`, `context.train`, `context.salt`, `context.group` and `context.valid`. Of the
  logits, only the shape matters.

  Args:
    logits: of one group.
    context: padding takes no expert: `expert` E and gate 0.
    k: experts a token, in [1, E].
    seed: of evaluation, an integer.

  Returns:
    A plan of A = K*S assignments, first choices first; the gate is 1/K, without gradient.

  Raises:
    ConfigError: k outside [1, E].

  Deviation: THOR draws experts for a whole batch, and trains two draws to agree; here each token
  has its own.
  """
  num_experts = logits.shape[-1]
  check_k("random_choice", k, num_experts)
  drawn_anew = context.train and context.key is not None
  key = context.key if drawn_anew else _fixed_key(seed, context)
  _, expert = jax.lax.top_k(jax.random.uniform(key, logits.shape), k)  # [S, K]
  return token_choice(expert, jnp.full(expert.shape, 1.0 / k), context, num_experts)


def _fixed_key(seed: int, context: RoutingContext) -> Key[Array, ""]:
  key = jax.random.key(seed)
  for number in (context.salt, context.group):
    key = key if number is None else jax.random.fold_in(key, number)
  return key


# What a token gets depends on the content of no token, under overflow either.
ROUTER = Router(random_choice, "no")
