"""S-BASE: balance by Sinkhorn's algorithm (Clark et al. 2022)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_jax.routing.options import Count, Divisor, Iterations, check, check_k, check_name
from moe_jax.routing.plan import RoutingContext, RoutingPlan
from moe_jax.routing.router import Router
from moe_jax.routing.token_choice import PRIORITIES, log_odds, token_choice


def sinkhorn(
  logits: Float[Array, "S E"],
  context: RoutingContext,
  *,
  k: Count = 1,
  iterations: Iterations = 30,
  temperature: Divisor = 1.0,
  priority: str = "choice",
) -> RoutingPlan:
  """Each token picks the K experts that a balanced transport plan gives it most of; the gate is its
  own probability.

  Paper: S-BASE in Unified Scaling Laws for Routed Language Models (Clark et al. 2022, arXiv
  2202.01169).

      P = argmax sum_te P_te x_te + tau H(P)  such that sum_e P_te = 1 and sum_t P_te = T/E
      training:  T_t = TopK_e(P_te);  inference:  T_t = TopK_e(x_te);  g_te = softmax(x_t)_e for e
                                                  in T_t

  x are the logits, H the entropy, tau `temperature`, T the number of real tokens; `balanced` gives
  P. Only the choice is balanced: the gate, and with it the gradient, is the raw probability. P is
  balanced, the choice only nearly: tokens of the same logits have the same row of P, and so the
  same experts. If all tokens are the same, P is 1/E everywhere. Equal entries go to the lower
  expert, but entries that are equal only in theory are told apart by rounding.

  Reads `context.valid` and `context.train`.

  Args:
    logits: router outputs of one group; float32 arithmetic whatever their dtype.
    context: padding has no row in P and names nobody: `expert` E and gate 0.
    k: experts a token, in [1, E].
    iterations: rounds of normalisation, >= 1.
    temperature: tau > 0; the smaller, the nearer is P to BASE's hard assignment, and the more
      iterations it needs.
    priority: who is served first, see `token_choice`; "gate" orders tokens by the probability of
      their first choice.

  Returns:
    A plan of A = K*S assignments, gates in [0, 1].

  Raises:
    ConfigError: k outside [1, E], iterations < 1, temperature <= 0, unknown priority.

  Deviation: a fixed number of iterations instead of a tolerance.
  """
  num_experts = logits.shape[-1]
  check_k("sinkhorn", k, num_experts)
  check("sinkhorn", "iterations", iterations, iterations >= 1, ">= 1")
  check("sinkhorn", "temperature", temperature, temperature > 0, "> 0")
  check_name("sinkhorn", "priority", priority, PRIORITIES)
  logits = logits.astype(jnp.float32)
  scores = balanced(logits, context.valid, iterations, temperature) if context.train else logits
  _, expert = jax.lax.top_k(jax.lax.stop_gradient(scores), k)  # [S, K]
  gate = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), expert, axis=-1)
  return token_choice(
    expert, gate, context, num_experts, priority=priority, score=log_odds(logits, expert[:, 0])
  )


def balanced(
  logits: Float[Array, "S E"], valid: Bool[Array, "S"] | None, iterations: int, temperature: float
) -> Float[Array, "S E"]:
  """log P by Sinkhorn's algorithm: columns and rows in turn are scaled to their sums; rows last, so
  they are exact.

  Without gradient. The rows of padding are meaningless; no column counts them.
  """
  num_tokens, num_experts = logits.shape
  x = jax.lax.stop_gradient(logits) / temperature
  real = jnp.ones((num_tokens, 1), bool) if valid is None else valid[:, None]
  target = jnp.log(jnp.maximum(jnp.sum(real), 1) / num_experts)

  def normalise(_, log_p):
    columns = jax.nn.logsumexp(log_p, axis=0, where=real)
    columns = jnp.where(jnp.any(real), columns, 0.0)  # the sum over no token
    log_p = log_p + target - columns
    return log_p - jax.nn.logsumexp(log_p, axis=-1, keepdims=True)

  return jax.lax.fori_loop(0, iterations, normalise, jax.nn.log_softmax(x, axis=-1))


# In training, a token's choice depends on what all others want. (Inference is causal.)
ROUTER = Router(sinkhorn, "yes")
