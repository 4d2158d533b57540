"""What to watch of a router: functions of (logits, plan), over all groups at once; padding counts in none.

`plan` is the router's, `kept` the same after `dispatch.drop_overflow`. Nothing here carries gradient that anyone needs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_jax.routing.plan import RoutingPlan


def load(plan: RoutingPlan) -> Float[Array, "E"]:
  """Each expert's share of the assignments; sums to 1. Of `plan`: what was asked for; of `kept`: what was served."""
  named = jnp.zeros(plan.num_experts).at[plan.expert].add(1.0, mode="drop")
  return named / jnp.maximum(jnp.sum(named), 1.0)


def max_violation(load: Float[Array, "E"]) -> Float[Array, ""]:
  """max_e load_e * E - 1 (MaxVio, arXiv 2408.15664). 0 at balance, E - 1 at collapse."""
  return jnp.max(load) * load.shape[-1] - 1.0


def drop_rate(plan: RoutingPlan, kept: RoutingPlan) -> Float[Array, ""]:
  """The share of the plan's assignments that found no slot, in [0, 1]."""
  asked, served = (jnp.sum(p.expert < p.num_experts) for p in (plan, kept))
  return (asked - served) / jnp.maximum(asked, 1)


def dropped_tokens(kept: RoutingPlan, valid: Bool[Array, "*G S"]) -> Float[Array, ""]:
  """The share of the real tokens that no expert serves, in [0, 1]."""
  num_tokens = valid.shape[-1]
  token, expert = (a.reshape(-1, a.shape[-1]) for a in (kept.token, kept.expert))
  served = jax.vmap(lambda t, e: jnp.zeros(num_tokens, bool).at[t].max(e < kept.num_experts))(token, expert)
  return jnp.sum(valid & ~served.reshape(valid.shape)) / jnp.maximum(jnp.sum(valid), 1)


def entropy(logits: Float[Array, "*G S E"], valid: Bool[Array, "*G S"] | None) -> Float[Array, ""]:
  """Mean over real tokens of the entropy of softmax(logits), in nats; in [0, ln E]."""
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  return _token_mean(-jnp.sum(jnp.exp(log_p) * log_p, axis=-1), valid)


def logit_max(logits: Float[Array, "*G S E"], valid: Bool[Array, "*G S"] | None) -> Float[Array, ""]:
  """The largest magnitude of any logit of a real token; what the z-loss holds down."""
  magnitude = jnp.max(jnp.abs(logits.astype(jnp.float32)), axis=-1)
  return jnp.max(magnitude if valid is None else jnp.where(valid, magnitude, 0.0))


def _token_mean(values, valid):
  weight = jnp.ones_like(values) if valid is None else valid.astype(values.dtype)
  return jnp.sum(values * weight) / jnp.maximum(jnp.sum(weight), 1.0)
