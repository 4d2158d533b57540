"""What to watch of a router: functions of (logits, plan), over all groups at once; padding counts
in none.

`plan` is the router's, `kept` the same after `dispatch.drop_overflow`. Nothing here carries
gradient that anyone needs.

Where a training step cuts its batch into microbatches, a mean of their metrics would be wrong: the
denominator of a ratio and the fullest expert differ between them. A layer therefore returns `sums`,
the step adds those of its microbatches up (`combine`), and `finish` makes the metrics of the whole
batch from them.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from moe_jax.routing.plan import RoutingPlan


def sums(
  logits: Float[Array, "*G S E"], plan: RoutingPlan, kept: RoutingPlan, valid: Bool[Array, "*G S"]
) -> dict[str, Shaped[Array, "..."]]:
  """What `finish` makes a layer's metrics from: counts (int32, exact below 2^31), a sum and a
  maximum, for `combine`.

  Returns:
    "assigned" [E] and "assignments": how many there are in the plan, of each expert and in all;
      "dropped": how many of
    them found no slot; "tokens": how many are real; "unserved": how many of these no expert serves;
      "entropy", in nats,
    summed over real tokens; "logit_max".
  """
  named = assigned(plan)
  asked = jnp.sum(named)
  return {
    "assigned": named,
    "assignments": asked,
    "dropped": asked - jnp.sum(assigned(kept)),
    "tokens": jnp.sum(valid),
    "unserved": _unserved(kept, valid),
    "entropy": summed_entropy(logits, valid),
    "logit_max": logit_max(logits, valid),
  }


def combine(sums: dict[str, Shaped[Array, "N *rest"]]) -> dict[str, Shaped[Array, "*rest"]]:
  """The `sums` of a batch from those of its N parts."""
  return {
    name: (jnp.max if name == "logit_max" else jnp.sum)(value, axis=0)
    for name, value in sums.items()
  }


def finish(sums: dict[str, Shaped[Array, "..."]]) -> dict[str, Float[Array, "..."]]:
  """The metrics of a layer, or of Lm layers whose sums have a leading axis; {} where there are no
  sums.

  Returns:
    "load" [E], "drop_rate", "max_violation", "dropped_tokens", "entropy", "logit_max", as the
      functions of these names.
  """
  if not sums:
    return {}
  shares = _ratio(sums["assigned"], sums["assignments"][..., None])
  return {
    "load": shares,
    "drop_rate": _ratio(sums["dropped"], sums["assignments"]),
    "max_violation": max_violation(shares),
    "dropped_tokens": _ratio(sums["unserved"], sums["tokens"]),
    "entropy": _ratio(sums["entropy"], sums["tokens"]),
    "logit_max": sums["logit_max"],
  }


def assigned(plan: RoutingPlan) -> Int[Array, "E"]:
  """How many assignments name each expert. Of `plan`: what was asked for; of `kept`: what was
  served."""
  return jnp.zeros(plan.num_experts, jnp.int32).at[plan.expert].add(1, mode="drop")


def load(plan: RoutingPlan) -> Float[Array, "E"]:
  """Each expert's share of the assignments; sums to 1. Of `plan`: what was asked for; of `kept`:
  what was served."""
  named = assigned(plan)
  return _ratio(named, jnp.sum(named))


def importance(plan: RoutingPlan) -> Float[Array, "E"]:
  """Each expert's share of the summed gates; sums to 1, or is all 0 where all gates are 0."""
  summed = jnp.zeros(plan.num_experts).at[plan.expert].add(plan.gate, mode="drop")
  total = jnp.sum(summed)
  return summed / jnp.where(total > 0, total, 1.0)


def max_violation(load: Float[Array, "*Lm E"]) -> Float[Array, "*Lm"]:
  """max_e load_e * E - 1 (MaxVio, arXiv 2408.15664). 0 at balance, E - 1 at collapse."""
  return jnp.max(load, axis=-1) * load.shape[-1] - 1.0


def drop_rate(plan: RoutingPlan, kept: RoutingPlan) -> Float[Array, ""]:
  """The share of the plan's assignments that found no slot, in [0, 1]."""
  asked, served = (jnp.sum(assigned(p)) for p in (plan, kept))
  return _ratio(asked - served, asked)


def dropped_tokens(kept: RoutingPlan, valid: Bool[Array, "*G S"]) -> Float[Array, ""]:
  """The share of the real tokens that no expert serves, in [0, 1]."""
  return _ratio(_unserved(kept, valid), jnp.sum(valid))


def capacity_used(kept: RoutingPlan, capacity: int) -> Float[Array, ""]:
  """The share of all groups' E * C slots that hold a token, in [0, 1]; `kept` is what that capacity
  left of a plan.

  Dropless routing has no slots and so no such number: do not call this where the capacity is None.
  """
  groups = math.prod(kept.expert.shape[:-1])
  return jnp.sum(kept.expert < kept.num_experts) / (groups * kept.num_experts * capacity)


def gate_norm(plan: RoutingPlan, valid: Bool[Array, "*G S"]) -> Float[Array, ""]:
  """Mean over real tokens of the sum of their gates. 1 for gates that are renormalised over a
  token's experts.

  Of `plan`: what the router gave; of `kept`: what arrived. Their difference is the mass that
  capacity took.
  """
  return jnp.sum(plan.gate) / jnp.maximum(jnp.sum(valid), 1)


def coactivation(plan: RoutingPlan, num_tokens: int) -> Float[Array, "E E"]:
  """Entry (i, j): the share of expert i's tokens that visit j too. Its diagonal is 1; rows of idle
  experts are 0.

  Args:
    plan: of any layout, with or without an axis of groups.
    num_tokens: S, tokens a group.
  """
  visits = _visits(plan, num_tokens).reshape(-1, plan.num_experts).astype(jnp.float32)
  both = visits.T @ visits  # counts: exact in float32 up to 2^24 tokens
  return both / jnp.maximum(jnp.diagonal(both)[:, None], 1.0)


def churn(before: RoutingPlan, after: RoutingPlan, num_tokens: int) -> Float[Array, ""]:
  """The share of the (token, expert) pairs of `before` that `after` lacks: 0 all are there, 1 none
  is.

  The two plans are of the same tokens and experts, as two checkpoints route them; S = `num_tokens`
  a group. Neither order nor gates count.
  """
  old, new = _visits(before, num_tokens), _visits(after, num_tokens)
  return jnp.sum(old & ~new) / jnp.maximum(jnp.sum(old), 1)


def entropy(logits: Float[Array, "*G S E"], valid: Bool[Array, "*G S"] | None) -> Float[Array, ""]:
  """Mean over real tokens of the entropy of softmax(logits), in nats; in [0, ln E]."""
  tokens = math.prod(logits.shape[:-1]) if valid is None else jnp.sum(valid)
  return _ratio(summed_entropy(logits, valid), tokens)


def summed_entropy(
  logits: Float[Array, "*G S E"], valid: Bool[Array, "*G S"] | None
) -> Float[Array, ""]:
  """The sum over real tokens of what `entropy` averages."""
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  of_token = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
  # Over each group first: shorter sums round less, and are the same into however many microbatches
  # the groups are cut.
  return jnp.sum(jnp.sum(of_token if valid is None else of_token * valid, axis=-1))


def logit_max(
  logits: Float[Array, "*G S E"], valid: Bool[Array, "*G S"] | None
) -> Float[Array, ""]:
  """The largest magnitude of any logit of a real token; what the z-loss holds down."""
  magnitude = jnp.max(jnp.abs(logits.astype(jnp.float32)), axis=-1)
  return jnp.max(magnitude if valid is None else jnp.where(valid, magnitude, 0.0))


def _visits(plan: RoutingPlan, num_tokens: int) -> Bool[Array, "G S E"]:
  """Which expert serves which token; one group where the plan has no axis of groups."""
  token, expert = (a.reshape(-1, a.shape[-1]) for a in (plan.token, plan.expert))
  nobody = jnp.zeros((num_tokens, plan.num_experts), bool)
  return jax.vmap(lambda t, e: nobody.at[t, e].set(True, mode="drop"))(token, expert)


def _unserved(kept: RoutingPlan, valid: Bool[Array, "*G S"]) -> Int[Array, ""]:
  """How many real tokens no expert serves."""
  num_tokens = valid.shape[-1]
  token, expert = (a.reshape(-1, a.shape[-1]) for a in (kept.token, kept.expert))
  served = jax.vmap(lambda t, e: jnp.zeros(num_tokens, bool).at[t].max(e < kept.num_experts))(
    token, expert
  )
  return jnp.sum(valid & ~served.reshape(valid.shape))


def _ratio(numerator, count):
  """The quotient; 0 where the count and so the numerator is 0."""
  return numerator / jnp.maximum(count, 1)
