"""Forced routing, which takes the assignments from a stored plan instead of from the logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.errors import choose
from moe_jax.routing.plan import RoutingContext, RoutingPlan


def replay(
  stored: RoutingPlan, logits: Float[Array, "S E"], context: RoutingContext, *, gate: str = "stored"
) -> RoutingPlan:
  """Returns the assignments of a stored plan, with its gates or with gates of the current logits.

  With gates of the current logits the router keeps learning while its assignments are frozen. This
  is not a router of a paper. The plan of any router can be replayed, in any order of assignments,
  and the result looks ahead as far as the router that made the plan.

  Reads `context.valid`.

  Args:
    stored: A plan for one group of the same S tokens.
    logits: Current router outputs of that group. They are cast to float32.
    context: Tokens that are now padding get `expert` E and gate 0, whatever the stored plan says.
    gate: The definition of the gates. "stored": the gates of the plan. "softmax": the probability,
      normalised over all experts. "softmax_kept": the probability divided by the sum of
      probabilities over the token's experts in the plan. "sigmoid" and "sigmoid_kept": likewise
      with sigmoids. The gates of "softmax" and "softmax_kept" are those of `top_k` with gate_norm
      "none" and "top_k"; the gates of "sigmoid" and "sigmoid_kept" are those of `sigmoid_bias` with
      the same. For a token with one expert, the "_kept" gates are the constant 1, without gradient.

  Returns:
    A plan with the A assignments of the stored plan, in its order. Assignments to no expert have
    gate 0.

  Raises:
    ConfigError: If the gate is unknown.
    ValueError: If the plan and the logits have different numbers of experts.
  """
  gate_of = choose("model.moe.replay_gate", gate, GATES)
  num_experts = logits.shape[-1]
  if stored.num_experts != num_experts:
    raise ValueError(
      f"the stored plan routes to {stored.num_experts} experts, but the router has {num_experts}"
    )
  has_expert = stored.expert < num_experts
  if context.valid is not None:
    has_expert &= context.valid[stored.token]
  plan = stored.replace(expert=jnp.where(has_expert, stored.expert, num_experts))
  gates = gate_of(plan, logits.astype(jnp.float32), has_expert)
  return plan.replace(gate=jnp.where(has_expert, gates, 0.0))


def _pick(plan, scores):
  """Returns scores[token, expert] of each assignment, or an arbitrary score if it has no expert."""
  return scores[plan.token, jnp.minimum(plan.expert, plan.num_experts - 1)]


def _kept(plan, log_scores, named):
  """Returns exp(log_score) of each assignment divided by the sum over its token's assignments.

  The largest score of each token is subtracted first, so that no sum underflows.
  """
  num_tokens = log_scores.shape[0]
  scores = jnp.where(named, _pick(plan, log_scores), -jnp.inf)
  largest = jax.lax.stop_gradient(jax.ops.segment_max(scores, plan.token, num_tokens))
  weight = jnp.exp(jnp.where(named, scores - largest[plan.token], -jnp.inf))
  total = jax.ops.segment_sum(weight, plan.token, num_tokens)[plan.token]
  return weight / jnp.where(named, total, 1.0)


# Each entry is a function f(plan, logits, named) that returns the gates of the assignments. `named`
# is True for assignments that have an expert.
GATES = {
  "stored": lambda plan, logits, named: plan.gate,
  "softmax": lambda plan, logits, named: _pick(plan, jax.nn.softmax(logits, axis=-1)),
  "softmax_kept": lambda plan, logits, named: _kept(plan, logits, named),
  "sigmoid": lambda plan, logits, named: _pick(plan, jax.nn.sigmoid(logits)),
  "sigmoid_kept": lambda plan, logits, named: _kept(plan, jax.nn.log_sigmoid(logits), named),
}
