"""Metrics for monitoring a router, as functions of the logits and plans of all groups together.

Padding has no influence on any of them. `plan` is the plan that the router returned and `kept` is
that plan after `dispatch.drop_overflow`. Except for `entropy`, they are not meant to be
differentiated.

If a training step splits its batch into microbatches, the mean of their metrics would be wrong: the
denominators of the ratios and the most loaded expert differ between microbatches. A layer therefore
returns `sums`, the training step adds those of its microbatches up with `combine`, and `finish`
computes the metrics of the whole batch from them.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from moe_jax.routing.plan import RoutingPlan

PERCENTILES = (5, 50, 95)


def sums(
  logits: Float[Array, "*G S E"], plan: RoutingPlan, kept: RoutingPlan, valid: Bool[Array, "*G S"]
) -> dict[str, Shaped[Array, "..."]]:
  """Returns the statistics of one layer from which `finish` computes its metrics.

  `combine` adds them up over microbatches. Counts are int32, which is exact below 2^31.

  Args:
    logits: Router outputs.
    plan: The plan that the router returned.
    kept: The plan after capacity was applied.
    valid: True for real tokens.

  Returns:
    A dictionary with these entries:
      "assigned" [E]: the number of assignments of the plan to each expert.
      "assignments": the number of assignments of the plan.
      "dropped": the number of these assignments that found no slot.
      "tokens": the number of real tokens.
      "unserved": the number of real tokens that no expert serves.
      "entropy": the entropy of the router's probabilities, in nats, summed over real tokens.
      "logit_max": the largest magnitude of a logit.
  """
  per_expert = assigned(plan)
  total = jnp.sum(per_expert)
  return {
    "assigned": per_expert,
    "assignments": total,
    "dropped": total - jnp.sum(assigned(kept)),
    "tokens": jnp.sum(valid),
    "unserved": _unserved(kept, valid),
    "entropy": summed_entropy(logits, valid),
    "logit_max": logit_max(logits, valid),
  }


def combine(sums: dict[str, Shaped[Array, "N *rest"]]) -> dict[str, Shaped[Array, "*rest"]]:
  """Returns the `sums` of a batch, given those of its N parts stacked along the first axis."""
  return {
    name: (jnp.max if name == "logit_max" else jnp.sum)(value, axis=0)
    for name, value in sums.items()
  }


def finish(sums: dict[str, Shaped[Array, "..."]]) -> dict[str, Float[Array, "..."]]:
  """Returns the metrics of a layer, or of Lm layers whose sums have a leading axis.

  Args:
    sums: The result of `sums` or `combine`, or {}.

  Returns:
    "load" [E], "experts_a_token" (the mean number of assignments that a real token asks for),
    "drop_rate", "max_violation", "dropped_tokens", "entropy" and "logit_max", the others as
    defined by the functions with these names. With zero-computation experts (the entry "free" of
    `layers/zero_experts.py`) also "zero_share", their share of the assignments, and
    "ffn_experts_a_token", the mean number of assignments of a real token to other experts. All
    metrics that are per expert or of all assignments include zero-computation experts. If `sums` is
    empty, so is the result.
  """
  if not sums:
    return {}
  shares = _ratio(sums["assigned"], sums["assignments"][..., None])
  free = {}
  if "free" in sums:
    free = {
      "zero_share": _ratio(sums["free"], sums["assignments"]),
      "ffn_experts_a_token": _ratio(sums["assignments"] - sums["free"], sums["tokens"]),
    }
  return free | {
    "load": shares,
    "experts_a_token": _ratio(sums["assignments"], sums["tokens"]),
    "drop_rate": _ratio(sums["dropped"], sums["assignments"]),
    "max_violation": max_violation(shares),
    "dropped_tokens": _ratio(sums["unserved"], sums["tokens"]),
    "entropy": _ratio(sums["entropy"], sums["tokens"]),
    "logit_max": sums["logit_max"],
  }


def assigned(plan: RoutingPlan) -> Int[Array, "E"]:
  """Returns the number of assignments to each expert.

  Applied to `plan` it counts the assignments that were requested, applied to `kept` those that were
  served.
  """
  return jnp.zeros(plan.num_experts, jnp.int32).at[plan.expert].add(1, mode="drop")


def load(plan: RoutingPlan) -> Float[Array, "E"]:
  """Returns each expert's share of the assignments, which sums to 1, or 0 without assignments.

  Applied to `plan` it describes the assignments that were requested, applied to `kept` those that
  were served.
  """
  per_expert = assigned(plan)
  return _ratio(per_expert, jnp.sum(per_expert))


def importance(plan: RoutingPlan) -> Float[Array, "E"]:
  """Returns each expert's share of the summed gates.

  The shares sum to 1, or are all 0 if all gates are 0.
  """
  summed = jnp.zeros(plan.num_experts).at[plan.expert].add(plan.gate, mode="drop")
  total = jnp.sum(summed)
  return summed / jnp.where(total > 0, total, 1.0)


def max_violation(load: Float[Array, "*Lm E"]) -> Float[Array, "*Lm"]:
  """Returns max_e load_e * E - 1 (MaxVio, arXiv 2408.15664).

  It is 0 at balance and E - 1 at collapse to one expert.

  Args:
    load: Each expert's share of the assignments.
  """
  return jnp.max(load, axis=-1) * load.shape[-1] - 1.0


def load_percentiles(load: Float[np.ndarray, "*Lm E"]) -> Float[np.ndarray, "N"]:
  """Returns `PERCENTILES` of the experts' loads over all layers, as multiples of an even load.

  All are 1 at balance. The lowest tells how many experts starve, the highest how many are crowded,
  however many layers there are.

  Args:
    load: Each expert's share of the assignments of its layer.
  """
  return np.percentile(np.asarray(load) * load.shape[-1], PERCENTILES)


def device_overload(load: Float[np.ndarray, "*Lm E"], devices: int) -> Float[np.ndarray, "*Lm"]:
  """Returns the load of the busiest device as a multiple of an even load, in [1, D].

  It is the factor by which the step of a layer that exchanges tokens waits for that device. Device
  d holds the E/D consecutive experts that begin with expert d*E/D. A layer without assignments has
  the value 0.

  Args:
    load: Each expert's share of the assignments of its layer.
    devices: The number of devices D among which the experts are divided, which divides E.
  """
  shares = np.asarray(load).reshape(*load.shape[:-1], devices, -1).sum(-1)
  return np.asarray(shares.max(-1) * devices)


def drop_rate(plan: RoutingPlan, kept: RoutingPlan) -> Float[Array, ""]:
  """Returns the share of the plan's assignments that found no slot, in [0, 1]."""
  requested, served = (jnp.sum(assigned(p)) for p in (plan, kept))
  return _ratio(requested - served, requested)


def dropped_tokens(kept: RoutingPlan, valid: Bool[Array, "*G S"]) -> Float[Array, ""]:
  """Returns the share of the real tokens that no expert serves, in [0, 1]."""
  return _ratio(_unserved(kept, valid), jnp.sum(valid))


def capacity_used(kept: RoutingPlan, capacity: int) -> Float[Array, ""]:
  """Returns the share of the E * C slots of all groups that hold a token, in [0, 1].

  It is not defined for dropless routing, which has no slots.

  Args:
    kept: A plan to which this capacity was applied.
    capacity: The number of slots per expert and group, C.
  """
  groups = math.prod(kept.expert.shape[:-1])
  return jnp.sum(kept.expert < kept.num_experts) / (groups * kept.num_experts * capacity)


def gate_norm(plan: RoutingPlan, valid: Bool[Array, "*G S"]) -> Float[Array, ""]:
  """Returns the mean over real tokens of the sum of their gates.

  It is 1 for gates that are renormalised over the experts of a token. Its value for `plan` minus
  its value for `kept` is the weight that capacity removed.
  """
  return jnp.sum(plan.gate) / jnp.maximum(jnp.sum(valid), 1)


def coactivation(plan: RoutingPlan, num_tokens: int) -> Float[Array, "E E"]:
  """Returns a matrix whose entry (i, j) is the share of expert i's tokens that also visit expert j.

  The diagonal is 1, except for experts without tokens, whose rows are 0.

  Args:
    plan: A plan with or without an axis of groups, in any order of assignments.
    num_tokens: The number of tokens per group, S.
  """
  visits = _visits(plan, num_tokens).reshape(-1, plan.num_experts).astype(jnp.float32)
  both = visits.T @ visits  # counts: exact in float32 up to 2^24 tokens
  return both / jnp.maximum(jnp.diagonal(both)[:, None], 1.0)


def churn(before: RoutingPlan, after: RoutingPlan, num_tokens: int) -> Float[Array, ""]:
  """Returns the share of the (token, expert) pairs of `before` that are missing from `after`.

  It compares how two checkpoints route the same tokens to the same experts. It ignores the order of
  assignments and the gates.

  Args:
    before: The plan of the earlier checkpoint.
    after: The plan of the later checkpoint.
    num_tokens: The number of tokens per group, S.
  """
  old, new = _visits(before, num_tokens), _visits(after, num_tokens)
  return jnp.sum(old & ~new) / jnp.maximum(jnp.sum(old), 1)


def entropy(logits: Float[Array, "*G S E"], valid: Bool[Array, "*G S"] | None) -> Float[Array, ""]:
  """Returns the mean over real tokens of the entropy of softmax(logits), in nats, in [0, ln E].

  It is also a loss, the "dynamic loss" of top-p routing (arXiv 2403.07652 Eq. 8): fewer experts add
  up to p if probabilities are less even.
  """
  tokens = math.prod(logits.shape[:-1]) if valid is None else jnp.sum(valid)
  return _ratio(summed_entropy(logits, valid), tokens)


def summed_entropy(
  logits: Float[Array, "*G S E"], valid: Bool[Array, "*G S"] | None
) -> Float[Array, ""]:
  """Returns the sum over real tokens of the entropy of softmax(logits), in nats."""
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  per_token = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
  # Summing over each group first makes the sums shorter, which reduces rounding errors. It also
  # makes them independent of the number of microbatches.
  return jnp.sum(jnp.sum(per_token if valid is None else per_token * valid, axis=-1))


def logit_max(
  logits: Float[Array, "*G S E"], valid: Bool[Array, "*G S"] | None
) -> Float[Array, ""]:
  """Returns the largest magnitude of any logit of a real token, which the z-loss limits."""
  magnitude = jnp.max(jnp.abs(logits.astype(jnp.float32)), axis=-1)
  return jnp.max(magnitude if valid is None else jnp.where(valid, magnitude, 0.0))


def _visits(plan: RoutingPlan, num_tokens: int) -> Bool[Array, "G S E"]:
  """Returns True where an expert serves a token.

  A plan without an axis of groups counts as one group.
  """
  token, expert = (a.reshape(-1, a.shape[-1]) for a in (plan.token, plan.expert))
  no_visits = jnp.zeros((num_tokens, plan.num_experts), bool)
  # An assignment to no expert has index E, which is out of bounds and dropped.
  return jax.vmap(lambda t, e: no_visits.at[t, e].set(True, mode="drop"))(token, expert)


def _unserved(kept: RoutingPlan, valid: Bool[Array, "*G S"]) -> Int[Array, ""]:
  """Returns the number of real tokens that no expert serves."""
  num_tokens = valid.shape[-1]
  token, expert = (a.reshape(-1, a.shape[-1]) for a in (kept.token, kept.expert))
  served = jax.vmap(lambda t, e: jnp.zeros(num_tokens, bool).at[t].max(e < kept.num_experts))(
    token, expert
  )
  return jnp.sum(valid & ~served.reshape(valid.shape))


def _ratio(numerator, count):
  """Returns the quotient, or 0 where the count is 0. The numerator must then be 0, too."""
  return numerator / jnp.maximum(count, 1)
