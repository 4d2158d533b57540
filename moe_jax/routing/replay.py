"""Forced routing: who goes where is taken from a stored plan, not from the logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.errors import choose
from moe_jax.routing.plan import RoutingContext, RoutingPlan


def replay(
  stored: RoutingPlan, logits: Float[Array, "S E"], context: RoutingContext, *, gate: str = "stored"
) -> RoutingPlan:
  """The stored plan's (token, expert) pairs, in its order, with its gates or with gates of the
  present logits.

  With gates of the present logits the router goes on learning while its choice is frozen. No router
  of a paper, and not limited to one layout of A: any router's plan can be replayed. Looks ahead as
  far as the router that made the plan.

  Reads `context.valid`.

  Args:
    stored: of one group of the same S tokens.
    logits: present router outputs of that group; float32 arithmetic whatever their dtype.
    context: tokens that are padding now name nobody, whatever is stored.
    gate: "stored": the plan's own; "softmax": the probability out of all experts; "softmax_kept":
      that, divided by its sum over the experts that the token has in the plan; "sigmoid" and
      "sigmoid_kept": likewise with sigmoids. They are what top_k with gate_norm "none" and "top_k",
      and sigmoid_bias with the same, would give these pairs. "_kept" is the constant 1, without
      gradient, for a token with one expert.

  Returns:
    A plan of the stored one's A assignments. What names nobody has gate 0.

  Raises:
    ConfigError: unknown gate.
    ValueError: the plan is for another number of experts than the logits.
  """
  gate_of = choose("model.moe.replay_gate", gate, GATES)
  num_experts = logits.shape[-1]
  if stored.num_experts != num_experts:
    raise ValueError(
      f"the stored plan routes to {stored.num_experts} experts, the router has {num_experts}"
    )
  named = stored.expert < num_experts
  if context.valid is not None:
    named &= context.valid[stored.token]
  plan = stored.replace(expert=jnp.where(named, stored.expert, num_experts))
  return plan.replace(gate=jnp.where(named, gate_of(plan, logits.astype(jnp.float32), named), 0.0))


def _pick(plan, scores):
  """scores[token, expert] for each assignment; anything where it names nobody."""
  return scores[plan.token, jnp.minimum(plan.expert, plan.num_experts - 1)]


def _kept(plan, log_scores, named):
  """exp(log_score) of each assignment over the sum of its token's; from logarithms, so that no sum
  underflows."""
  num_tokens = log_scores.shape[0]
  scores = jnp.where(named, _pick(plan, log_scores), -jnp.inf)
  largest = jax.lax.stop_gradient(jax.ops.segment_max(scores, plan.token, num_tokens))
  weight = jnp.exp(jnp.where(named, scores - largest[plan.token], -jnp.inf))
  total = jax.ops.segment_sum(weight, plan.token, num_tokens)[plan.token]
  return weight / jnp.where(named, total, 1.0)


GATES = {
  "stored": lambda plan, logits, named: plan.gate,
  "softmax": lambda plan, logits, named: _pick(plan, jax.nn.softmax(logits, axis=-1)),
  "softmax_kept": lambda plan, logits, named: _kept(plan, logits, named),
  "sigmoid": lambda plan, logits, named: _pick(plan, jax.nn.sigmoid(logits)),
  "sigmoid_kept": lambda plan, logits, named: _kept(plan, jax.nn.log_sigmoid(logits), named),
}
