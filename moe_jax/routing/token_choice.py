"""From the experts that each token chose to a plan: what token-choice routers share, and the order
of service."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.routing.plan import RoutingContext, RoutingPlan
from moe_jax.routing.router import Leak


def token_choice(
  expert: Int[Array, "S K"],
  gate: Float[Array, "S K"],
  context: RoutingContext,
  num_experts: int,
  *,
  priority: str = "choice",
  score: Float[Array, "S"] | None = None,
) -> RoutingPlan:
  """The plan in which token s names expert[s, 0] first, then expert[s, 1], ...

  Args:
    expert: in [0, E]; E names nobody, and the gate of such a choice becomes 0.
    gate: combine weights; the only argument that carries gradient.
    context: `valid` is read: padding names nobody.
    num_experts: E.
    priority: a key of `PRIORITIES`: who is served first. "choice": all first choices by position,
      then all second choices (GShard Algorithm 1); "token": all choices of the first token, then
      those of the second; "gate": as "choice", but tokens ordered by `score`, which orders all K
      choices (batch-prioritised routing: V-MoE, ST-MoE).
    score: which tokens "gate" serves first, the highest; needed there only.

  Returns:
    A plan of A = K*S assignments.
  """
  num_tokens, k = expert.shape
  if context.valid is not None:
    expert = jnp.where(context.valid[:, None], expert, num_experts)
    if score is not None:
      score = jnp.where(context.valid, score, -jnp.inf)  # padding last
  token, choice = PRIORITIES[priority](num_tokens, k, score)
  expert, gate = expert[token, choice], gate[token, choice]
  return RoutingPlan(
    token=token,
    expert=expert,
    gate=jnp.where(expert < num_experts, gate, 0.0),
    num_experts=num_experts,
  )


def select(
  scores: Float[Array, "S E"], k: int, ties: Float[Array, "S E"] | None = None
) -> Int[Array, "S K"]:
  """Each token's K experts of the highest score, best first, without gradient.

  Args:
    scores: by which experts are selected.
    k: experts a token.
    ties: decides between equal scores, the higher first: the logits, where scores are probabilities
      plus a bias, which may have underflowed or saturated. Where this is equal, too, or None, the
      lower index comes first.
  """
  if ties is None:
    return jax.lax.top_k(jax.lax.stop_gradient(scores), k)[1]
  order = jnp.argsort(-jax.lax.stop_gradient(ties), axis=-1, stable=True)
  _, place = jax.lax.top_k(jnp.take_along_axis(jax.lax.stop_gradient(scores), order, axis=-1), k)
  return jnp.take_along_axis(order, place, axis=-1)


def log_odds(logits: Float[Array, "S E"], expert: Int[Array, "S"]) -> Float[Array, "S"]:
  """log(p / (1 - p)) of each token's softmax probability p of one expert, without gradient.

  It has the order of p and, unlike p, tells very sure tokens apart: in float32 their probabilities
  are all 1.
  """
  logits = jax.lax.stop_gradient(logits)
  named = jnp.arange(logits.shape[-1]) == expert[:, None]
  others = jax.nn.logsumexp(jnp.where(named, -jnp.inf, logits), axis=-1)
  return jnp.take_along_axis(logits, expert[:, None], axis=-1)[:, 0] - others


def leak(k: int, priority: str) -> Leak:
  """Returns the `Leak` of a router that ranks experts by the token alone and takes the k best."""
  if priority == "gate":
    return "yes"
  return "overflow" if priority == "choice" and k > 1 else "no"


def _by_choice(num_tokens: int, k: int, score: Float[Array, "S"] | None):
  return jnp.tile(jnp.arange(num_tokens), k), jnp.repeat(jnp.arange(k), num_tokens)  # [K*S]


def _by_token(num_tokens: int, k: int, score: Float[Array, "S"] | None):
  return jnp.repeat(jnp.arange(num_tokens), k), jnp.tile(jnp.arange(k), num_tokens)  # [S*K]


def _by_gate(num_tokens: int, k: int, score: Float[Array, "S"]):
  order = jnp.argsort(-score, stable=True)
  return jnp.tile(order, k), jnp.repeat(jnp.arange(k), num_tokens)  # [K*S]


PRIORITIES = {"choice": _by_choice, "token": _by_token, "gate": _by_gate}
