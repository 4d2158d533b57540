"""Random routing, which serves as a control for every learned router."""

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
  """Routes each token to K different experts, which are drawn uniformly at random.

  A learned router should be better than this one, which ignores the logits.

  Paper: none has this equation; THOR (arXiv 2110.04260) also selects experts at random.

      u_e ~ U[0, 1) for each expert e,  T = TopK(u),  y = 1/K sum_{i in T} E_i(x)

  In training, u is drawn from `context.key`, which is new in each step. Outside training, or
  without a key, u is drawn from `seed`, `context.salt` and `context.group`, where None is skipped.
  The numbers are then the same in each call, so that evaluation is deterministic, but they differ
  between layers, groups and seeds of the run. The experts of a token do not depend on the number of
  tokens that follow. Among equal numbers, the expert with the lower index comes first.

  Reads `context.key`, `context.train`, `context.salt`, `context.group` and `context.valid`. Only
  the shape of the logits matters.

  Args:
    logits: Router outputs of one group.
    context: Padding gets `expert` E and gate 0.
    k: The number of experts per token, K, in [1, E].
    seed: An integer seed for evaluation.

  Returns:
    A plan with A = K*S assignments, first choices first. The gates are 1/K, without gradient.

  Raises:
    ConfigError: If k is outside [1, E].

  Deviation: THOR draws experts for a whole batch and trains two draws to agree. Here each token has
  its own experts.
  """
  num_experts = logits.shape[-1]
  check_k("random_choice", k, num_experts)
  if context.train and context.key is not None:
    key = context.key
  else:
    key = _fixed_key(seed, context)
  _, expert = jax.lax.top_k(jax.random.uniform(key, logits.shape), k)  # [S, K]
  return token_choice(expert, jnp.full(expert.shape, 1.0 / k), context, num_experts)


def _fixed_key(seed: int, context: RoutingContext) -> Key[Array, ""]:
  """Returns the key for evaluation, which is the same in each call."""
  key = jax.random.key(seed)
  for number in (context.salt, context.group):
    key = key if number is None else jax.random.fold_in(key, number)
  return key


# The experts of a token, and whether they have a slot for it, depend on the content of no token.
ROUTER = Router(random_choice, "no")
