"""Functions that token-choice routers share: selection of experts and priority of assignments."""

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
  """Returns the plan in which token s chooses expert[s, 0] first, then expert[s, 1] and so on.

  Reads `context.valid`.

  Args:
    expert: The chosen experts, in [0, E]. E stands for no expert, and the gate of such a choice
      becomes 0.
    gate: Combine weights; the only argument that carries gradient.
    context: Padding (where `valid` is False) chooses no expert.
    num_experts: The number of experts, E.
    priority: The order in which assignments are served, a key of `PRIORITIES`. "choice" serves all
      first choices by position, then all second choices (GShard Algorithm 1). "token" serves all
      choices of the first token, then those of the second. "gate" is like "choice", but orders the
      tokens of every round of choices by descending `score` (batch-prioritised routing: V-MoE,
      ST-MoE).
    score: The score of each token for priority "gate". Other priorities ignore it.

  Returns:
    A plan with A = K*S assignments.
  """
  num_tokens, k = expert.shape
  if context.valid is not None:
    expert = jnp.where(context.valid[:, None], expert, num_experts)
    if score is not None:
      # Padding comes last.
      score = jnp.where(context.valid, score, -jnp.inf)
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
  """Returns the K experts with the highest scores of each token, best first, without gradient.

  Args:
    scores: The scores by which experts are selected.
    k: The number of experts per token.
    ties: Decides between equal scores; the higher value comes first. Routers pass the logits if
      their scores are probabilities plus a bias, because probabilities may underflow or saturate.
      Where `ties` is equal, too, or None, the lower index comes first.
  """
  if ties is None:
    return jax.lax.top_k(jax.lax.stop_gradient(scores), k)[1]
  # `jax.lax.top_k` returns the lower index first among equal values. Sorting the experts by `ties`
  # beforehand therefore makes it prefer the higher value of `ties`.
  order = jnp.argsort(-jax.lax.stop_gradient(ties), axis=-1, stable=True)
  _, place = jax.lax.top_k(jnp.take_along_axis(jax.lax.stop_gradient(scores), order, axis=-1), k)
  return jnp.take_along_axis(order, place, axis=-1)


def log_odds(logits: Float[Array, "S E"], expert: Int[Array, "S"]) -> Float[Array, "S"]:
  """Returns log(p / (1 - p)) for each token's softmax probability p of one expert.

  It orders tokens as p does. Unlike p, it distinguishes very confident tokens, whose probabilities
  are all 1 in float32. It carries no gradient.
  """
  logits = jax.lax.stop_gradient(logits)
  is_chosen = jnp.arange(logits.shape[-1]) == expert[:, None]
  others = jax.nn.logsumexp(jnp.where(is_chosen, -jnp.inf, logits), axis=-1)
  return jnp.take_along_axis(logits, expert[:, None], axis=-1)[:, 0] - others


def probabilities(logits: Float[Array, "*N E"], **_: object) -> Float[Array, "*N E"]:
  """Returns the softmax of the logits, which is `Router.biased` of routers that add b to it."""
  return jax.nn.softmax(logits.astype(jnp.float32), axis=-1)


def leak(k: int, priority: str) -> Leak:
  """Returns the `Leak` of a router whose k choices for a token depend on that token alone."""
  if priority == "gate":
    return "yes"
  return "overflow" if priority == "choice" and k > 1 else "no"


# Each function returns (token, choice) of the K*S assignments in the order of service.
def _by_choice(num_tokens: int, k: int, score: Float[Array, "S"] | None):
  return jnp.tile(jnp.arange(num_tokens), k), jnp.repeat(jnp.arange(k), num_tokens)  # [K*S]


def _by_token(num_tokens: int, k: int, score: Float[Array, "S"] | None):
  return jnp.repeat(jnp.arange(num_tokens), k), jnp.tile(jnp.arange(k), num_tokens)  # [S*K]


def _by_gate(num_tokens: int, k: int, score: Float[Array, "S"]):
  order = jnp.argsort(-score, stable=True)
  return jnp.tile(order, k), jnp.repeat(jnp.arange(k), num_tokens)  # [K*S]


PRIORITIES = {"choice": _by_choice, "token": _by_token, "gate": _by_gate}
